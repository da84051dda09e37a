#!/bin/sh
# torch 2.13.0, CPU, gloo: all_reduce adds equal rows of one tensor to different sums, from three ranks on.
#
# Each rank has one row, repeated. With two ranks every row of the result is the same. With three or four the rows
# differ in their last bits, because each chunk of the flat tensor is added up in another order of the ranks; which rows
# differ depends on how many there are. So in a model split over three ranks or more, what a sequence computes depends
# on its place in the batch, and not only on the batch's shape.
#
# Seen (columns of 384 that differ from the first row, two rows):
#   2 ranks: 0      3 ranks: 141      4 ranks: 173
# and with 64 rows the first four are equal with three ranks, too.
#
# Exits 0 while that is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.2
cat > "$folder/rows.py" <<'PROGRAM'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def rank(number, ranks, meeting, queue):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=number, world_size=ranks)
    row = torch.randn(384, generator=torch.Generator().manual_seed(number))
    found = {}
    for rows in (2, 64):
        tensor = row.repeat(rows, 1)
        dist.all_reduce(tensor)
        found[rows] = [int((tensor[i] != tensor[0]).sum()) for i in range(min(rows, 4))]
    if number == 0:
        queue.put(found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    seen = {}
    for ranks in (2, 3, 4):
        queue = mp.get_context("spawn").SimpleQueue()
        running = mp.spawn(rank, (ranks, f"{sys.argv[1]}/meeting{ranks}", queue), nprocs=ranks, join=False)
        seen[ranks] = queue.get()
        running.join()
        print(f"torch {torch.__version__}, {ranks} ranks: columns that differ from row 0, of 2 and of 64 rows: {seen[ranks]}")
    as_described = seen[2] == {2: [0, 0], 64: [0, 0, 0, 0]} and all(
        seen[ranks][2][1] > 0 and seen[ranks][64] == [0, 0, 0, 0] for ranks in (3, 4)
    )
    sys.exit(0 if as_described else 1)
PROGRAM
"$folder/venv/bin/python" "$folder/rows.py" "$folder"
