"""A writer of a folder remote, to be killed: says each thing before it does it, and after it returned.

python folder_child.py FOLDER SEED
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from thaw.remote.folder import FolderBucket


def main(root: str, seed: str) -> None:
    bucket, dice = FolderBucket(Path(root)), random.Random(seed)
    print("open", flush=True)
    while True:
        name = f"packs/{dice.getrandbits(64):016x}"
        data = name.encode() * dice.choice((1, 1000, 200_000))
        bucket.put(name, data)
        print(f"put {name} {len(data)}", flush=True)
        found = bucket.read("refs/main")
        number = int(found.data.split()[0]) + 1 if found else 0
        value = b"%d %s" % (number, name.encode())
        print(f"moving {number} {name}", flush=True)
        made = bucket.swap("refs/main", value, found.version) if found else bucket.create("refs/main", value)
        assert made is not None, "nobody else writes"
        print(f"moved {number} {name}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
