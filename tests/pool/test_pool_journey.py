"""A branch's journey: how many functions of the pool one chunk enters in its worker, and how often it changes rooms.

Counted by the interpreter (`sys.setprofile`), on the thread that runs the chunk, for one branch of one token. The
bounds are what it took when this was written; the way before is in docs/design/0018-the-pools-rooms.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import thaw.pool
from thaw import Sampling
from thaw.core.errors import EngineDied
from thaw.pool import BranchResult, ForkPool
from thaw.pool.schedule.batch import Batch
from thaw.pool.schedule.fork_point import ForkPoint
from thaw.testing.laws.kit import until

POOL = str(Path(thaw.pool.__file__).parent)
ONE = Sampling(max_tokens=1)


class Journey(list[str]):
    """The modules of the functions that were entered, in order."""

    def profile(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(POOL) and not code.co_name.startswith("<"):
            self.append(str(Path(code.co_filename).relative_to(POOL).with_suffix("")))

    @property
    def num_stays(self) -> int:
        """Runs of entries in one module."""
        return sum(1 for _ in itertools.groupby(self))


@pytest.fixture
def journey(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Journey]:
    monkeypatch.setenv("THAW_CACHE_DIR", str(tmp_path / "cache"))
    entered, run = Journey(), Batch.run

    def counted(self: Batch, *given: Any) -> list[BranchResult]:
        entered.clear()
        sys.setprofile(entered.profile)
        try:
            return run(self, *given)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(Batch, "run", counted)
    yield entered


@pytest.fixture
def pool(journey: Journey) -> Iterator[ForkPool]:
    with ForkPool("fake", workers=2, backend="inline") as pool:
        yield pool


def a_fork_where_it_lives(pool: ForkPool) -> Callable[[], list[BranchResult]]:
    session = pool.session(seed=7)
    session.append("a document " * 40)
    return lambda: pool.fork(session, 1, ONE, snapshot="never")


def a_snapshot_in_another_worker(pool: ForkPool) -> Callable[[], list[BranchResult]]:
    session = pool.session(seed=7)
    session.append("a document " * 40)
    snapshot = pool.snapshot(session)
    other = next(name for name in pool.workers if name != session.worker)
    return lambda: pool.fork(snapshot, 1, ONE, worker=other)


def a_resident(pool: ForkPool) -> Callable[[], list[BranchResult]]:
    first = a_snapshot_in_another_worker(pool)
    first()
    return first


def tokens_that_nobody_has(pool: ForkPool) -> Callable[[], list[BranchResult]]:
    ids = pool.encode("an own document " * 30)
    return lambda: pool.fork(ids, 1, ONE, snapshot="never")


def a_session_in_another_worker(pool: ForkPool) -> Callable[[], list[BranchResult]]:
    session = pool.session(seed=7)
    session.append("a document " * 40)
    other = next(name for name in pool.workers if name != session.worker)
    return lambda: pool.fork(session, 1, ONE, worker=other)


@pytest.mark.parametrize(
    ("prepared", "action", "num_entries", "num_stays"),
    [
        (a_fork_where_it_lives, "fork", 11, 9),
        (a_resident, "fork", 12, 10),
        (a_snapshot_in_another_worker, "hydrate", 21, 15),
        (tokens_that_nobody_has, "prefill", 20, 14),
        (a_session_in_another_worker, "hydrate", 31, 21),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_branchs_journey_is_short(
    pool: ForkPool, journey: Journey, prepared: Callable[[ForkPool], Callable[[], list[BranchResult]]], action: str,
    num_entries: int, num_stays: int,
) -> None:  # fmt: skip
    result = prepared(pool)()[0]
    assert result.decision is not None and result.decision.action == action
    assert "schedule/point_loader" in journey and len(journey) <= num_entries and journey.num_stays <= num_stays


def test_a_detour_is_counted(monkeypatch: pytest.MonkeyPatch, pool: ForkPool, journey: Journey) -> None:
    """The check on the check."""
    round_ = a_fork_where_it_lives(pool)
    round_()
    short = len(journey), journey.num_stays
    fork = Batch._fork
    monkeypatch.setattr(
        Batch,
        "_fork",
        staticmethod(lambda chunk, life, loaded: (fork(chunk, life, loaded), chunk.point.lives_in(life))[0]),
    )
    round_()
    assert (len(journey), journey.num_stays) == (short[0] + 1, short[1] + 2)


def test_a_fork_point_is_a_value(pool: ForkPool) -> None:
    """What is captured of it makes another version of it, and no chunk finds its point changed under its hands."""
    session = pool.session(seed=7)
    session.append("a document " * 40)
    point = pool._resolver.find(session)
    later = pool._captures.capture(point)
    assert point.stored is None and later.stored is not None and later.origin is point.origin
    assert pool._captures.now(point).stored is later.stored
    assert pool._captures.capture(point).stored is later.stored, "and that is done once"
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.stored = later.stored  # type: ignore[misc]
    assert {field.name for field in dataclasses.fields(ForkPoint)} >= {"held", "stored"}


def test_a_version_of_this_moment_has_no_fork_of_a_worker_that_ended(pool: ForkPool) -> None:
    session = pool.session(seed=7)
    session.append("a document " * 40)
    point = pool._resolver.find(session)
    assert pool._captures.now(point) is point and point.held is not None
    pool._fleet.failed(pool._fleet.named(session.worker), point.held.life, EngineDied("ended for this test"))
    assert pool._captures.now(point).held is None and pool._captures.capture(point).stored is None


def test_what_is_known_of_a_point_goes_with_it(pool: ForkPool) -> None:
    session = pool.session(seed=7)
    session.append("a document " * 40)
    point = pool._captures.capture(pool._resolver.find(session))
    assert point.stored is not None and pool.stats().arena.num_points == 1
    session.append("more")
    del point
    pool.snapshot(session)
    session.close()
    del session
    until(lambda: pool.stats().arena.num_points == 0)
