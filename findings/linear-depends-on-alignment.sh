#!/bin/sh
# torch 2.13.0, CPU: linear of one row gives other last bits where the same weights lie at another offset in their file.
#
# safetensors maps a file and hands out tensors where they lie. Two files with the same float32 weight, one with a few
# bytes of another tensor before it, give equal weights at different addresses modulo 64. A product with one row then
# differs in its last bits; with 2 or 64 rows it does not. So resharding a checkpoint, or quantising a neighbour, can
# change the logits of a single sequence although every tensor is equal, and a copy to aligned memory can as well.
#
# Seen (offset modulo 64 of both weights, then whether linear is equal for 1, 2 and 64 rows):
#   0 and 8: 1 row differs, 2 rows equal, 64 rows equal
#
# Exits 0 while that is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.2 safetensors==0.8.0
cat > "$folder/aligned.py" <<'PROGRAM'
import sys

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear

torch.manual_seed(0)
torch.set_num_threads(1)
weight = torch.randn(160, 64)


def placed(name, num_before):
    """The weight as it is mapped from a file that has `num_before` floats of another tensor before it."""
    before = {"a": torch.zeros(num_before)} if num_before else {}
    save_file({**before, "b": weight}, f"{sys.argv[1]}/{name}")
    return load_file(f"{sys.argv[1]}/{name}")["b"]


# The header's length decides where data begins, so the two offsets are searched for, not assumed.
found = {}
for num_before in range(0, 34, 2):
    tensor = placed(f"{num_before}.safetensors", num_before)
    found.setdefault(tensor.data_ptr() % 64, tensor)
here, there = found[0], found[8]
assert torch.equal(here, there) and torch.equal(here, weight)
equal = {}
for rows in (1, 2, 64):
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))
    equal[rows] = torch.equal(linear(x, here), linear(x, there))
print(f"torch {torch.__version__}, weights at 0 and 8 modulo 64: linear is equal by rows: {equal}")
sys.exit(0 if equal == {1: False, 2: True, 64: True} else 1)
PROGRAM
"$folder/venv/bin/python" "$folder/aligned.py" "$folder"
