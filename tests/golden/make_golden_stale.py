"""Makes the golden repository of KV that was kept over policy steps: `python tests/golden/make_golden_stale.py FOLDER`.

Run once; the folder is checked in and never written again. The fake engine read a text under policy 0, answered under
policy 1, whose weights are others, and went on under policy 2: states are `thaw.state/2` with `kv_ranges`, and the
prefix hashes of their segments begin with `thaw.prefix/3`.

    main~2    300 tokens, all of policy 0
    main~1    and 8 sampled under policy 1
    main      and a question, read under policy 2
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import thaw
from thaw import Sampling

TEXT = ("The same text for every policy. " * 11)[:300]


def make(folder: Path) -> None:
    with thaw.load_engine("fake") as engine, thaw.init(folder, engine=engine) as repo:
        session = repo.session(seed=1, stale_kv=True)
        session.append(TEXT)
        commits = [session.commit("read", branch="main").commit]
        engine.update_weights("1")
        engine.set_policy("1")
        session.generate(sampling=Sampling(max_tokens=8, ignore_eos=True))
        commits.append(session.commit("answered", branch="main").commit)
        engine.update_weights("2")
        engine.set_policy("2")
        session.append(" And then?")
        commits.append(session.commit("asked", branch="main").commit)
        answer = session.generate(sampling=Sampling(temperature=0.0, max_tokens=8, ignore_eos=True))
    for leftover in ("reserve", "refs.lock", "gc.lock"):
        (folder / leftover).unlink(missing_ok=True)
    known = {"commits": commits, "answer": list(answer.token_ids), "logprobs": list(answer.logprobs)}
    folder.with_suffix(".json").write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
