"""Sleep and wake: the engine lets go of all its KV, and every session goes on with the bits of an undisturbed run."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import thaw
from thaw import Sampling
from thaw.core.errors import Busy, Conflict, EngineDied, InvalidRequest, StaleSession, Unsupported
from thaw.engines.base import Engine, GenerateRequest, Hydrated, HydratePlan
from thaw.engines.embedded.engine import EmbeddedEngine
from thaw.engines.embedded.pages import Extent
from thaw.engines.embedded.session import LiveSession
from thaw.repo import Drained, Repository, Session
from thaw.repo import hydrate as hydration
from thaw.repo.drain import DrainReport, drain

WORDS = "The capital of France is Paris. " * 12
ANSWER = Sampling(max_tokens=6, ignore_eos=True)
LONG = Sampling(max_tokens=120, ignore_eos=True)
CYCLES = 20


class Family:
    """A parent and a fork, one that is parked between its turns, one that is asked the whole time: all live at once."""

    def __init__(self, repo: Repository) -> None:
        self.trunk = repo.session(seed=1)
        self.trunk.append(WORDS)
        (self.child,) = self.trunk.fork(1)
        self.parked, self.other = repo.session(seed=2), repo.session(seed=3)
        self.parked.append(WORDS[5:])

    @property
    def all(self) -> tuple[Session, ...]:
        return self.trunk, self.child, self.parked, self.other

    def turn(self, i: int) -> list[tuple[object, ...]]:
        """What each says next, to the bit."""
        told = [one.generate(f" {i}", ANSWER) for one in self.all]
        self.parked.park()
        return [(one.token_ids, one.logprobs) for one in told]


@pytest.fixture
def calm(tmp_path: Path) -> Iterator[Family]:
    """The same sessions where nothing sleeps."""
    with thaw.load_engine("fake") as engine, thaw.open(tmp_path / "calm", engine=engine) as repo:
        yield Family(repo)


def live(engine: Engine) -> list[LiveSession]:
    assert isinstance(engine, EmbeddedEngine)
    return list(engine._sessions.values())


def extents(engine: Engine) -> list[Extent]:
    return [run.extent for one in live(engine) for run in one.kv.runs]


@pytest.mark.parametrize("level", [1, 2])
def test_sessions_go_on_over_twenty_sleeps_bit_for_bit(repo: Repository, calm: Family, level: int) -> None:
    family = Family(repo)
    for i in range(CYCLES):
        assert family.turn(i) == calm.turn(i)
        ran = repo.engine._backend.num_forwarded_tokens  # type: ignore[attr-defined]
        slept = repo.sleep(level=level)
        assert len(slept.points) == 4 and slept.num_dropped == 3 and not slept.missed
        woken = repo.wake()
        assert woken.num_loaded == 3 and woken.nbytes > 0 and not woken.missed
        assert repo.engine._backend.num_forwarded_tokens == ran, "nothing is prefilled again"  # type: ignore[attr-defined]
    assert [one.text for one in family.all] == [one.text for one in calm.all]
    assert family.trunk.proof is not None and family.trunk.proof.hit


def test_a_sleeping_engine_holds_no_page(repo: Repository) -> None:
    family = Family(repo)
    for i in range(CYCLES):
        family.turn(i)
        before = [weakref.ref(extent) for extent in extents(repo.engine)]
        assert before
        repo.sleep()
        gc.collect()
        assert not [one for one in before if one() is not None] and not extents(repo.engine)
        repo.wake()
        assert len({id(one) for one in extents(repo.engine)}) <= 6, "flat over the cycles"


def test_pages_that_are_kept_over_a_sleep_are_seen(
    repo: Repository, calm: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the tests above: whoever reads what was freed, and belongs to others by now, says other tokens."""
    family = Family(repo)
    assert family.turn(0) == calm.turn(0)

    def keep(self: LiveSession) -> None:
        for run in self.kv.runs:
            for page in range(run.extent.num_pages):
                run.extent.page(0, page)[:64] = bytes(64)  # type: ignore[index]

    monkeypatch.setattr(LiveSession, "drop", keep)
    monkeypatch.setattr(Session, "go_on_from", lambda self, point, beside: 0)
    repo.sleep()
    repo.wake()
    assert family.turn(1)[0] != calm.turn(1)[0]


def test_kv_that_nobody_stored_is_gone_and_whoever_uses_it_hears_so(repo: Repository) -> None:
    """The control: the engine's own sleep keeps nothing for a session."""
    engine, session, parked, empty = repo.engine, repo.session(), repo.session(), repo.session()
    session.append(WORDS)
    parked.append(WORDS)
    parked.park()
    assert engine.sleep() == (session.ref,)
    engine.wake()
    for use in (
        lambda: session.generate("x", ANSWER),
        lambda: session.append("x"),
        lambda: session.fork(1),
        lambda: session.commit("lost"),
        session.park,
    ):
        with pytest.raises(StaleSession, match="let go of the KV"):
            use()
    assert session.text == WORDS and session.num_kv == 0
    assert parked.generate("x", ANSWER).num_cached_tokens == len(WORDS)
    assert empty.generate("x", ANSWER).token_ids


def test_nothing_works_while_it_sleeps(repo: Repository) -> None:
    session = repo.session()
    session.append(WORDS)
    point = session.commit("read", branch="main")
    repo.sleep()
    assert repo.is_asleep and repo.is_drained
    engine, ref = repo.engine, session.ref
    for use in (
        engine.identity,
        engine.open,
        engine.sleep,
        lambda: engine.set_policy("2"),
        lambda: engine.update_weights("7"),
        lambda: engine.append(ref, [1]).result(),
        lambda: engine.generate([GenerateRequest(session=ref, prompt=(1,), sampling=ANSWER)]).result(),
        lambda: engine.fork(ref, 1).result(),
        lambda: engine.park(ref).result(),
        lambda: session.commit("asleep"),
    ):
        with pytest.raises(Busy, match="asleep"):
            use()
    for begin in (repo.session, lambda: repo.session("main"), lambda: session.append("x"), repo.sleep, repo.drain):
        with pytest.raises(Busy, match=r"repo\.wake"):
            begin()
    with pytest.raises(Busy, match=r"repo\.wake"):
        repo.undrain()
    assert session.text == WORDS and repo.log("main")[0].commit == point.commit
    repo.wake()
    assert not repo.is_asleep and not repo.is_drained
    assert session.commit("awake", branch="main").num_tokens == len(WORDS)
    assert repo.resolve("main~1").commit == point.commit, "history is as if it had not slept"
    for again in (repo.wake, engine.wake):
        with pytest.raises(Conflict, match="sleep"):
            again()


def test_a_completion_that_a_sleep_cut_short_goes_on_to_the_same_tokens(tmp_path: Path, slow_engine: Engine) -> None:
    with thaw.open(tmp_path / "slow", engine=slow_engine) as repo:
        whole = repo.session(seed=0).generate(WORDS, LONG)
        session = repo.session(seed=0)
        stream = session.stream(WORDS, LONG)
        next(iter(stream))
        slept = repo.sleep()
        with pytest.raises(Drained) as caught:
            stream.result()
        assert caught.value.point == slept.points[-1].point
        repo.wake()
        resumed = session.resume()
        assert (resumed.token_ids, resumed.logprobs) == (whole.token_ids, whole.logprobs)
        assert resumed.usage.num_prefilled_tokens <= 1


def test_the_engine_stays_awake_where_a_session_could_not_be_stored(repo: Repository) -> None:
    stale, good = repo.session(), repo.session()
    stale.append("old ")
    repo.engine.set_policy("next")
    good.append("new ")
    with pytest.raises(Busy, match=r"1 of 2 sessions could not be stored.*lose=True"):
        repo.sleep()
    assert not repo.is_asleep and not repo.is_drained and good.generate("x", ANSWER).token_ids
    assert [one.session for one in repo.sleep(lose=True).missed] == [stale.ref]
    repo.wake()
    assert good.generate("x", ANSWER).token_ids and stale.text == "old "
    with pytest.raises(StaleSession):
        stale.generate("x", ANSWER)


def test_a_prefill_that_outlasts_the_drain_loses_no_token(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is captured half-way, and over when the engine looks for what runs."""
    with thaw.open(tmp_path / "slow", engine=engine) as repo:
        repo.engine.identity()
        session, backend = repo.session(), engine._backend  # type: ignore[attr-defined]
        forward, admission = backend.forward, repo._context.admission
        settle = admission.settle
        monkeypatch.setattr(backend, "forward", lambda feeds: time.sleep(0.1) or forward(feeds))
        monkeypatch.setattr(admission, "settle", lambda limit: not limit and settle(limit))  # half of the limit is over
        appending = threading.Thread(target=session.append, args=(WORDS * 60,))
        reports: list[DrainReport] = []

        def late(*args: Any) -> DrainReport:
            reports.append(drain(*args))
            appending.join(60)
            return reports[-1]

        monkeypatch.setattr("thaw.repo.sleep.drain", late)
        appending.start()
        while not admission.works():
            time.sleep(0.001)
        with pytest.raises(Busy, match=r"1 of 1 sessions could not be stored.*went on meanwhile"):
            repo.sleep()
        assert 0 < reports[0].points[0].num_tokens < len(WORDS * 60) == session.num_tokens
        assert session.generate("x", ANSWER).num_cached_tokens == len(WORDS * 60)
        slept = repo.sleep(lose=True)
        assert not slept.missed and slept.points[0].num_tokens == session.num_tokens, "it is stored by now"
        repo.wake()


def test_a_load_that_outlasts_the_drain_keeps_the_engine_awake(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = repo.session()
    whole.append(WORDS)
    whole.commit("read", branch="main")
    held, real, found = threading.Event(), EmbeddedEngine._hydrate, list[Session]()

    def slowly(self: EmbeddedEngine, plan: HydratePlan) -> Hydrated:
        held.wait(60)
        return real(self, plan)

    monkeypatch.setattr(EmbeddedEngine, "_hydrate", slowly)
    opening = threading.Thread(target=lambda: found.append(repo.session("main")))
    opening.start()
    while not repo._context.admission._beginning:
        time.sleep(0.001)
    for lose in (False, True):
        with pytest.raises(Busy, match="load of a session was not over"):
            repo.sleep(timeout_s=0.2, lose=lose)
    held.set()
    opening.join(60)
    assert found[0].generate("x", ANSWER).num_cached_tokens == len(WORDS)


def test_an_engine_that_works_for_others_stays_awake(tmp_path: Path, slow_engine: Engine) -> None:
    with thaw.open(tmp_path / "slow", engine=slow_engine) as repo:
        session = repo.session()
        session.append(WORDS)
        other = slow_engine.open()
        running = slow_engine.generate([GenerateRequest(session=other, prompt=(1, 2), sampling=LONG)])
        next(iter(running))
        with pytest.raises(Busy, match="1 sessions are running"):
            repo.sleep()
        assert running.result()[0].token_ids and session.generate("x", ANSWER).token_ids


def test_a_capture_under_way_is_waited_for(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    from thaw.engines.embedded import transfer

    session, held, begun = repo.session(), threading.Event(), threading.Event()
    session.append(WORDS)
    real: Callable[..., object] = transfer.write

    def late(*args: object) -> object:
        begun.set()
        held.wait(60)
        return real(*args)

    monkeypatch.setattr(transfer, "write", late)
    points: list[str] = []
    slept: list[object] = []
    committing = threading.Thread(target=lambda: points.append(session.commit("slowly").commit))
    committing.start()
    assert begun.wait(60)
    sleeping = threading.Thread(target=lambda: slept.append(repo.engine.sleep()))
    sleeping.start()
    sleeping.join(0.2)
    assert sleeping.is_alive() and not slept
    held.set()
    committing.join(60)
    sleeping.join(60)
    assert slept == [(session.ref,)]
    repo.engine.wake()
    assert repo.session(points[0]).generate("x", ANSWER).token_ids


def test_sessions_of_a_namespace_and_those_that_were_closed_meanwhile(repo: Repository) -> None:
    lost, mine, theirs, closed = repo.session(), repo.session(), repo.within("acme").session(), repo.session()
    for one in (lost, mine, theirs, closed):
        one.append(WORDS)
    repo.sleep()
    closed.close()
    del lost
    gc.collect()
    assert repo.wake().num_loaded == 2
    assert mine.generate("x", ANSWER).token_ids and theirs.generate("x", ANSWER).token_ids
    with pytest.raises(InvalidRequest, match="namespace"):
        repo.within("acme").sleep()


def test_a_session_that_is_closed_while_it_is_loaded_holds_no_kv(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = repo.session()
    trunk.append(WORDS)
    (child,) = trunk.fork(1)
    real = hydration.hydrate

    def closing(*args: Any, **told: Any) -> Any:
        done = real(*args, **told)
        trunk.close()
        return done

    repo.sleep()
    monkeypatch.setattr(hydration, "hydrate", closing)
    assert not repo.wake().missed, "the child, which was to be loaded beside it, is loaded by itself"
    assert [one.ref for one in live(repo.engine)] == [child.ref]
    assert child.generate("x", ANSWER).num_cached_tokens == len(WORDS)


def test_weights_that_are_others_after_a_sleep_refuse_the_sessions(repo: Repository) -> None:
    """Level 2 reads them again: what was written into them by nobody's announcement is gone."""
    backend = repo.engine._backend  # type: ignore[attr-defined]
    backend.weights[0] ^= 1
    session = repo.session()
    session.append(WORDS)
    repo.sleep(level=2)
    woken = repo.wake()
    assert woken.num_loaded == 0 and "identity-mismatch" in woken.missed[0].why
    with pytest.raises(StaleSession):
        session.generate("x", ANSWER)


def test_a_sleep_that_fails_half_way_drops_nothing(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, session, calm = repo.engine._backend, repo.session(seed=1), repo.session(seed=1)  # type: ignore[attr-defined]
    for one in (session, calm):
        one.append(WORDS)
    leave = backend.sleep

    def fails(level: int) -> None:
        leave(level)
        raise MemoryError("no room for the weights")

    for level in (1, 2):
        with monkeypatch.context() as patched, pytest.raises(MemoryError):
            patched.setattr(backend, "sleep", fails)
            repo.sleep(level=level)
        assert not repo.is_asleep and not repo.is_drained and session.num_kv == len(WORDS)
    assert session.generate("x", ANSWER).token_ids == calm.generate("x", ANSWER).token_ids
    repo.sleep()
    assert repo.wake().num_loaded == 2


def test_an_engine_that_was_closed_asleep_says_that_it_is_gone(tmp_path: Path) -> None:
    """And not that it sleeps: whoever waits until it is awake would wait for good."""
    engine = thaw.load_engine("fake")
    with thaw.open(tmp_path / "closed", engine=engine) as repo:
        repo.session().append(WORDS)
        repo.sleep()
        with pytest.raises(Busy):
            engine.open()
        engine.close()
        for act in (engine.open, engine.identity, engine.wake, repo.wake):
            with pytest.raises(EngineDied, match="closed"):
                act()


def test_a_wait_for_what_was_let_in_that_is_interrupted_leaves_it_awake(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, session = repo.engine, repo.session()
    session.append(WORDS)
    nap = engine._nap  # type: ignore[attr-defined]

    def interrupted(over: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(nap._changed, "wait_for", interrupted)
        engine.sleep()
    assert session.generate("x", ANSWER).token_ids
    assert engine.sleep() == (session.ref,)
    engine.wake()


@pytest.mark.parametrize("level", [0, 3, "1"])
def test_a_level_that_there_is_not_is_refused_and_changes_nothing(repo: Repository, level: int) -> None:
    session = repo.session()
    session.append(WORDS)
    with pytest.raises(InvalidRequest, match="sleep level"):
        repo.sleep(level=level)
    assert not repo.is_drained and session.generate("x", ANSWER).token_ids


def test_an_engine_without_a_sleep_mode_is_not_drained(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(self: EmbeddedEngine, *, level: int) -> None:
        Engine.require_sleep(self, level=level)

    monkeypatch.setattr(EmbeddedEngine, "require_sleep", cannot)
    with pytest.raises(Unsupported, match="no sleep mode"):
        repo.sleep()
    assert not repo.is_drained


@pytest.mark.parametrize("groups", ["two", "hybrid", "states", "latent"])
def test_every_kind_of_cache_comes_back(tmp_path: Path, groups: str) -> None:
    said = []
    for sleeps in (False, True):
        with (
            thaw.load_engine("fake", groups=groups, interior=False) as engine,
            thaw.open(tmp_path / f"{groups}{sleeps}", engine=engine) as repo,
        ):
            family = Family(repo)
            for i in range(3):
                said.append(family.turn(i))
                if sleeps:
                    repo.sleep()
                    repo.wake()
    assert said[:3] == said[3:]


def test_a_session_that_keeps_stale_kv_keeps_it_over_a_sleep(repo: Repository) -> None:
    session = repo.session(stale_kv=True)
    session.append(WORDS)
    repo.engine.identity()
    repo.engine.set_policy("next")
    session.append("x")
    before = session.trajectory().kv_ranges
    repo.sleep()
    repo.wake()
    assert session.trajectory().kv_ranges == before and session.generate("y", ANSWER).token_ids
