"""Repositories of many commits, to see what a page makes of them."""

from __future__ import annotations

import random
import time
from pathlib import Path

import thaw
from thaw.core.canonical import U64
from thaw.core.ids import CommitId
from thaw.core.objects import Commit
from thaw.engines.base import Engine
from thaw.repo import Repository
from thaw.store import RefUpdate

JOINED = 15
"""Parents of a commit beside the first; so that thousands of commits are reached from few branches."""


LONGEST = 200
"""Characters of a branch's name, at most."""


def long_names(num: int, length: int = LONGEST) -> list[str]:
    return [f"{number}-{'x' * (length - len(str(number)) - 1)}" for number in range(num)]


def named_chain(repo: Repository, num: int, message: str = "deep", each: int = 1, length: int = LONGEST) -> None:
    """Commits one after the other, each with branches: so each is a session that forked from the one before."""
    with repo.session() as session:
        session.append("a document")
        root = session.commit(message)
    names = iter(long_names(num * each, length))
    with repo.store.begin(root.commit) as tx:
        at, updates = root.commit, []
        for number in range(num):
            when = U64(time.time_ns() + number)
            at = CommitId(tx.put(Commit(state=root.state, parents=(at,), message=message, time_ns=when)))
            updates += [
                RefUpdate(name=next(names), kind="branch", target=at, expect=None, reason="grown") for _ in range(each)
            ]
        tx.commit(*updates)


class Grower:
    """Repositories of many commits of one state, each shape made once a run."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self._folder, self._engine = folder, engine

    def grown(self, shape: str, num: int = 10_000) -> Path:
        """star: all fork from the first; chain: each from the one before; comb: every second one goes on; random."""
        path = self._folder / shape
        if not path.exists():
            with thaw.open(path, engine=self._engine) as repo:
                self._grow(repo, shape, num)
        return path

    def _grow(self, repo: Repository, shape: str, num: int) -> None:
        session = repo.session()
        session.append("a document " * 20)
        root = session.commit("the first", branch="main")
        session.close()
        chance, now = random.Random(0), time.time_ns()
        ids: list[CommitId] = [root.commit]
        leaves: set[CommitId] = set()
        with repo.store.begin(root.commit) as tx:

            def put(message: str, *parents: CommitId) -> CommitId:
                when = U64(now + len(ids))
                ids.append(CommitId(tx.put(Commit(state=root.state, parents=parents, message=message, time_ns=when))))
                leaves.difference_update(parents)
                leaves.add(ids[-1])
                return ids[-1]

            spine = root.commit
            while len(ids) < num - len(leaves) // JOINED:
                parent = {"star": ids[0], "chain": ids[-1], "comb": spine, "random": chance.choice(ids)}[shape]
                made = put(f"commit {len(ids)}: " + "many words of a message " * 3, parent)
                spine = made if len(ids) % 2 else spine
            ends, joins = sorted(leaves), put("where joins begin")
            tips = [put("a join", joins, *ends[i : i + JOINED]) for i in range(0, len(ends), JOINED)]
            tx.commit(
                *(
                    RefUpdate(name=f"join/{i}", kind="branch", target=tip, expect=None, reason="grown")
                    for i, tip in enumerate(tips)
                )
            )
