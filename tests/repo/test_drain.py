"""Drain: nothing begins any more, every live session has a point or is named, and streams end with theirs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import thaw
from thaw import Sampling
from thaw.core.errors import Busy, InvalidRequest, StaleSession
from thaw.engines.base import Captured, CapturePlan, Engine, Handle, SessionRef
from thaw.repo import Drained, Repository, Session

LONG = Sampling(max_tokens=120, ignore_eos=True)
WORDS = "The capital of France is Paris. " * 12


@pytest.fixture
def slow(tmp_path: Path, slow_engine: Engine) -> Repository:
    return thaw.open(tmp_path / "slow", engine=slow_engine)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def decoding(repo: Repository, n: int) -> list[tuple[Session, thaw.repo.Stream[thaw.engines.base.Completion]]]:
    """Sessions in the middle of an answer."""
    sessions = [repo.session(seed=i) for i in range(n)]
    begun = [(one, one.stream(f"{WORDS}{i}", LONG)) for i, one in enumerate(sessions)]
    until(lambda: all(len(one.tokens) > len(WORDS) + 8 for one in sessions))
    return begun


def test_a_drain_gives_every_session_a_point_and_ends_streams_with_it(slow: Repository) -> None:
    begun = decoding(slow, 3)
    parked, idle = slow.session(), slow.session()
    parked.append(WORDS)
    parked.park()
    idle.append(WORDS)
    report = slow.drain(timeout_s=60)
    assert report.complete and report.num_empty == 0
    was = {one.session: one.was for one in report.points}
    assert [was[one.ref] for one, _ in begun] == ["running"] * 3
    assert was[parked.ref] == "parked" and was[idle.ref] == "idle"
    assert parked.view().parked
    for session, stream in begun:
        with pytest.raises(Drained) as caught:
            stream.result()
        assert caught.value.point == report.point(session.ref) is not None
        with pytest.raises(Drained):
            list(stream)


def test_what_a_drain_cut_short_goes_on_to_the_tokens_of_an_undisturbed_run(slow: Repository) -> None:
    whole = slow.session(seed=0).generate(f"{WORDS}0", LONG).token_ids
    begun = decoding(slow, 1)
    report = slow.drain()
    slow.undrain()
    point = report.point(begun[0][0].ref)
    assert point is not None
    again = slow.session(point)
    resumed = again.resume()
    assert resumed.token_ids == whole and resumed.usage.num_prefilled_tokens <= 1
    assert begun[0][0].resume().token_ids == whole  # the session itself is still there


def test_nothing_begins_while_the_engine_is_drained(repo: Repository) -> None:
    session = repo.session()
    session.append("one ")
    session.commit("read", branch="main")
    repo.drain(why="deploy")
    for begin in (
        repo.session,
        lambda: repo.session("main"),
        lambda: repo.fork("main", 2),
        lambda: session.append("two "),
        lambda: session.generate("two ", LONG),
        lambda: session.chat("two "),
        lambda: session.fork(2),
        lambda: repo.within("acme").session(),
        repo.drain,
    ):
        with pytest.raises(Busy, match="deploy"):
            begin()
    assert session.text == "one " and session.commit("still", branch="main").num_tokens == 4
    assert repo.undrain() and not repo.undrain()
    assert session.generate("two ", Sampling(max_tokens=2)).token_ids


def test_a_drain_moves_no_branch_and_the_next_commit_follows_it(repo: Repository) -> None:
    session = repo.session()
    session.append("one ")
    first = session.commit("read", branch="main")
    session.append("two ")
    point = repo.drain().points[0].point
    repo.undrain()
    assert repo.resolve("main").commit == first.commit != point
    assert repo.store.get(point).parents == (first.commit,)  # type: ignore[union-attr]
    session.append("three ")
    second = session.commit("more")
    assert second.branch == "main" and repo.resolve("main~1").commit == first.commit


def test_a_session_that_cannot_be_captured_is_named_and_the_others_are_kept(repo: Repository) -> None:
    stale, good = repo.session(), repo.session()
    stale.append("old ")
    repo.engine.set_policy("next")
    good.append("new ")
    report = repo.drain()
    assert [one.session for one in report.points] == [good.ref]
    assert [one.session for one in report.missed] == [stale.ref] and not report.complete
    assert StaleSession.kind in report.missed[0].why


def test_what_is_late_is_named_and_whoever_waits_is_told(slow: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    ((session, stream),) = decoding(slow, 1)
    held = threading.Event()
    real = slow.engine.capture

    def late(*args: object) -> object:
        held.wait(60)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(slow.engine, "capture", late)
    report = slow.drain(timeout_s=0.5)
    assert report.points == () and report.missed[0].session == session.ref and report.seconds < 10
    assert "not captured within 0.5 s" in report.missed[0].why
    with pytest.raises(Drained, match=r"0 of 1 sessions were stored.*not captured within") as caught:
        stream.result()
    assert caught.value.point is None
    held.set()


def test_nobody_waits_for_an_engine_that_its_owner_has_stopped(
    slow: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, held = threading.Event(), threading.Event()
    real = slow.engine.capture

    def late(session: SessionRef, plan: CapturePlan) -> Handle[Captured]:
        stopped.set()
        held.wait(60)
        return real(session, plan)

    session = slow.session()
    session.append("one ")
    monkeypatch.setattr(slow.engine, "capture", late)
    monkeypatch.setattr(slow.engine, "stalled", lambda: "its owner sleeps" if stopped.is_set() else "")
    report = slow.drain(timeout_s=50.0)
    assert report.points == () and report.missed[0].session == session.ref and report.seconds < 20
    assert report.missed[0].why == "not captured: its owner sleeps"
    held.set()


def test_a_prefill_is_not_cut_short(slow: Repository) -> None:
    session = slow.session()
    reading = threading.Thread(target=lambda: session.append(WORDS * 8))
    reading.start()
    until(lambda: bool(slow._context.admission.works()) or not reading.is_alive())
    report = slow.drain()
    reading.join()
    assert report.points[0].num_tokens == len(WORDS) * 8


def test_sessions_of_every_namespace_are_stored_in_theirs(repo: Repository) -> None:
    mine, theirs, empty = repo.session(), repo.within("acme").session(), repo.session()
    mine.append("one ")
    theirs.append("two ")
    report = repo.drain()
    assert {(one.namespace, one.num_tokens) for one in report.points} == {("", 4), ("acme", 4)}
    assert report.num_empty == 1 and empty.num_tokens == 0
    point = report.point(theirs.ref)
    assert point is not None and repo.within("acme").resolve(str(point)[3:]).num_tokens == 4
    with pytest.raises(InvalidRequest, match="whole repository"):
        repo.within("acme").drain()


def test_a_limit_that_is_none_is_refused(repo: Repository) -> None:
    for bad in (0, -1, 1e9, float("nan")):
        with pytest.raises(InvalidRequest, match="timeout_s"):
            repo.drain(timeout_s=bad)
    assert not repo.undrain()
