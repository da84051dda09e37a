"""The victim of the kill -9 tests: commits, moves refs and collects garbage in a loop, and says what returned.

`python kill9_child.py REPOSITORY SEED`: one line per acknowledged step on stdout, written after the call returned.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

from store_sessions import commit, tokens

from thaw.store import RefUpdate, Store


def say(text: str) -> None:
    os.write(1, (text + "\n").encode())


def main(path: Path, seed: int) -> None:
    dice = random.Random(seed)
    with Store.open(path) as store:
        say("open")
        while True:
            step(store, dice)


def step(store: Store, dice: random.Random) -> None:
    name = f"b{dice.randrange(3)}"
    ref = store.ref(name)
    if dice.random() < 0.2:
        store.gc(keep_reflog_s=0)
        say("gc")
    elif ref is not None and dice.random() < 0.3:
        say(f"deleting {name} {ref.target}")
        store.update_refs(RefUpdate(name, "branch", None, ref.target, "delete"))
        say(f"deleted {name}")
    else:
        tip = ref.target if ref else None
        size = (store.get(store.get(tip).state).num_tokens if tip else 0) + dice.randrange(100, 400)
        base = tip if size < 3000 else None
        parents = (tip,) if tip else ()
        new = tokens(size if base else 200, seed=int(name[1]))
        one = commit(store, new, branch=name, expect=tip, base=base, parents=parents)
        say(f"committed {name} {one}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
