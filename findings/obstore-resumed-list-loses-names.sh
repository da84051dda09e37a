#!/bin/sh
# obstore 0.12.1: a listing of a LocalStore that is resumed with `offset` loses objects.
#
# `list(store, offset=name)` gives the objects whose names sort after `name`, on every store. MemoryStore (as S3 does)
# lists in the order of names, so whoever was interrupted goes on after the last name seen and has them all. LocalStore
# lists in the order in which the file system's directories give them, and compares names all the same: what sorts before
# the last name seen, and had not been listed yet, never comes.
#
# Seen (300 objects put in shuffled order, listed up to the 100th, then from there by its name):
#   MemoryStore: 300 of 300      LocalStore: 112 of 300 (which ones depends on the file system)
#
# Exits 0 while MemoryStore has all and LocalStore does not, 1 when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet obstore==0.12.1
cat > "$folder/resume.py" <<'PROGRAM'
import random
import sys

import obstore
from obstore.store import LocalStore, MemoryStore

names = [f"packs/{number:03}" for number in range(300)]
random.Random(0).shuffle(names)


def found(store):
    for name in names:
        obstore.put(store, name, b"x")
    first = [one["path"] for one in obstore.list(store, "packs").collect()][:100]
    rest = [one["path"] for one in obstore.list(store, "packs", offset=first[-1]).collect()]
    return len({*first, *rest})


in_memory, local = found(MemoryStore()), found(LocalStore(sys.argv[1], mkdir=True))
print(f"obstore {obstore.__version__}: MemoryStore {in_memory} of 300, LocalStore {local} of 300")
sys.exit(0 if in_memory == 300 and local < 300 else 1)
PROGRAM
"$folder/venv/bin/python" "$folder/resume.py" "$folder/store"
