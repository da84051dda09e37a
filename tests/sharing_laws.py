"""What sessions of one lineage have in common is there once after a restore: in the engine's blocks and in host memory,
and read once. For engines that serve from processes of their own; `tests/snapshot/test_sharing.py` has the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import thaw
from thaw import Sampling
from thaw.core.cache import token_nbytes
from thaw.engines.base import Engine
from thaw.engines.served.client import hydrating
from thaw.repo import Repository, Session
from thaw.snapshot import restore, snapshot
from thaw.testing.laws.kit import Lab
from thaw.testing.plans import mount_at

TRUNK = "The river is long and slow, and nobody knows its name. " * 11  # 605 tokens
NUM_TRUNK, READ, CHILDREN = 605, 21, 4
LONG = Sampling(max_tokens=40, ignore_eos=True, temperature=0.8)
HELD_S = 60.0


def family(repo: Repository) -> list[Session]:
    """A trunk that is committed, its children, which have read something each, and a stranger with as many words."""
    trunk = repo.session(seed=1)
    trunk.append(TRUNK)
    trunk.commit("read", branch="main")
    children = list(trunk.fork(CHILDREN))
    for number, child in enumerate(children):
        child.append(f"{number}. And who named it? ")
    stranger = repo.session(seed=2)
    stranger.append(TRUNK.upper())
    return [trunk, *children, stranger]


def held(engine: Any, sessions: list[Session], unit: int, count: Callable[[dict[str, int]], int]) -> int:
    """How much more the engine holds, by its own `count`, while the sessions are pinned: in units of `unit` tokens,
    each once, however many sessions are in it."""
    before = count(engine.stats())
    for session in sessions:
        assert engine.pin(session.ref, HELD_S).result() == session.view().num_kv // unit * unit
    try:
        return count(engine.stats()) - before
    finally:
        engine.release_pins()


def arena(engine: Any) -> int:
    """Bytes of host memory that live sessions hold. What nobody refers to any more is told with the first message."""
    engine.stats()
    return int(engine.stats()["arena_nbytes"])


def shares_after_a_restore(
    engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch, *, blindly: bool, empty: Callable[[], object],
    counted: Callable[[list[Session]], int] | None = None, expected: int = 0, apart: int = 0,
) -> None:  # fmt: skip
    """`counted`: of what the engine holds; at most `expected` where it holds what is common once, `apart` where each
    session has its own. `blindly`: nothing is shared (the control)."""
    with thaw.open(path, engine=engine) as repo:
        sessions = family(repo)
        names = [session.engine_ref for session in sessions]
        assert not snapshot(repo, "engine").missed
        whole = [session.generate("And now? ", LONG).token_ids for session in sessions]
        for session in sessions:
            session.close()
        if blindly:
            monkeypatch.setattr(hydrating, "_shared", lambda *_: None)
        empty()
        before = arena(engine)
        back = restore(repo, "engine")
        again = [back.sessions[name] for name in names]
        assert not back.missed and back.num_recomputed_tokens == 0
        assert all(one.proof is not None and one.proof.num_cached_tokens == one.view().num_kv for one in again)
        if counted is not None:
            found = counted(again)
            assert found == apart if blindly else 0 < found <= expected, (
                f"{found}; {expected} if shared, {apart} if not"
            )
        read = sum(one.proof.nbytes for one in again if one.proof) // token_nbytes(engine.info.groups)
        own = CHILDREN * READ
        trunks = CHILDREN + 2 if blindly else 2
        assert read == trunks * (NUM_TRUNK - 1) + own
        assert arena(engine) - before == read * token_nbytes(engine.info.groups)
        assert [session.generate("And now? ", LONG).token_ids for session in again] == whole
        for session in again:
            session.close()


def reads_all_where_the_session_beside_is_gone(engine: Any, path: Path) -> None:
    """The engine has let go of its record; it says so, and goes on."""
    lab = Lab(mount_at(path))
    plan = lab.plan(lab.capture(engine, lab.begin(engine)))
    first = lab.hydrate(engine, plan)
    engine._talk.dropped.append(engine._sessions[first.session].node.name)
    engine.stats()
    found = lab.hydrate(engine, msgspec.structs.replace(plan, beside=first.session))
    assert found.proof.num_cached_tokens == plan.num_kv
    assert found.proof.nbytes == first.proof.nbytes > 0
