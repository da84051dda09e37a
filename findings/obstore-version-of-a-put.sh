#!/bin/sh
# obstore 0.12.1: what `put` and `head` say of an object's version cannot be passed back for a conditional update.
#
# A put with `mode={"e_tag": …, "version": …}` replaces an object only while it is that version (`UpdateVersion`), and
# `put` returns a dict with just these two keys. On a store without versions `version` is None there, as in what `head`
# returns, and a put with that very dict raises TypeError. The key has to be left out instead; then a MemoryStore
# replaces the object, refuses the same version a second time (PreconditionError), and a LocalStore says it can't do it
# (NotImplementedError).
#
# Seen: TypeError: 'None' is not an instance of 'str'
#
# Exits 0 while that is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet obstore==0.12.1
cat > "$folder/update.py" <<'PROGRAM'
import sys

import obstore
from obstore.store import LocalStore, MemoryStore


def name_of_error(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "none"


def tried(store):
    version = obstore.put(store, "head", b"one")
    short = {"e_tag": version["e_tag"]}
    return version["version"], [
        name_of_error(lambda: obstore.put(store, "head", b"two", mode=mode)) for mode in (version, short, short)
    ]


in_memory, local = tried(MemoryStore()), tried(LocalStore(sys.argv[1], mkdir=True))
print(f"obstore {obstore.__version__}: MemoryStore {in_memory}, LocalStore {local}")
seen = (None, ["TypeError", "none", "PreconditionError"]), (None, ["TypeError", *["NotImplementedError"] * 2])
sys.exit(0 if (in_memory, local) == seen else 1)
PROGRAM
"$folder/venv/bin/python" "$folder/update.py" "$folder/store"
