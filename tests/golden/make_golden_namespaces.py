"""Makes the golden repository of namespaces: `python tests/golden/make_golden_namespaces.py FOLDER`.

Run once; the folder is checked in and never written again. The fake engine read one text three times, in the default
namespace and in `acme` and `bolt`: commits of the two are `thaw.commit/2`, their prefix hashes begin with
`thaw.prefix/2`, the database has format 3 and refs.json is a `thaw.refs/2`.

    ""      main    300 tokens
    acme    main    300 tokens and 8 that were sampled; tag v1 at the first 300
    bolt    side    300 tokens; HEAD is side
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import thaw
from thaw import Sampling
from thaw.repo import Repository

TEXT = ("The same text for everybody. " * 11)[:300]


def told(repo: Repository, branch: str) -> None:
    session = repo.session(seed=1)
    session.append(TEXT)
    session.commit("told", branch=branch)


def make(folder: Path) -> None:
    with thaw.load_engine("fake") as engine, thaw.init(folder, engine=engine) as repo:
        acme, bolt = repo.within("acme"), repo.within("bolt")
        told(repo, "main")
        told(acme, "main")
        acme.tag("v1", "main")
        session = acme.session("main")
        session.generate("", Sampling(max_tokens=8, ignore_eos=True))
        session.commit("more", branch="main")
        told(bolt, "side")
        bolt.store.set_head("side")
        ids = {there.namespace: {ref.name: ref.target for ref in there.store.refs()} for there in (repo, acme, bolt)}
    for leftover in ("reserve", "refs.lock", "gc.lock"):
        (folder / leftover).unlink(missing_ok=True)
    folder.with_suffix(".json").write_text(json.dumps(ids, indent=1) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
