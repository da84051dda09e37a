"""Sessions: what may be asked of them and what may not, park and return, cancel, close."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from thaw.core.errors import Busy, Cancelled, EngineDied, InvalidRequest, NotFound, ThawError, TimedOut, TooLong
from thaw.core.objects import Chat, ChatTurn
from thaw.engines.base import Engine, GenerateRequest, Handle, SessionRef
from thaw.testing.laws.bytes_law import blob_ids
from thaw.testing.laws.kit import (
    LIMIT_S,
    EngineKit,
    Lab,
    Load,
    can,
    greedy,
    ids,
    kv_complete,
    same,
    seeded,
    when,
)


class SessionLaw(EngineKit):
    def test_a_view_shows_tokens_and_turns(self, engine: Engine, lab: Lab) -> None:
        session = engine.open(seed=3)
        assert engine.view(session).tokens == () and engine.view(session).num_kv == 0
        view = engine.append(session, ids(10), text="ten", role="user").result(LIMIT_S)
        assert (view.tokens, view.running) == (ids(10), False) and kv_complete(engine, view.num_kv, 10)
        out = lab.one(engine, session, greedy(4))
        prompt, completion = engine.view(session).turns
        assert (prompt.kind, prompt.start, prompt.end, prompt.text, prompt.role) == ("prompt", 0, 10, "ten", "user")
        assert (completion.kind, completion.start, completion.end) == ("completion", 10, 14)
        assert completion.logprobs == out.logprobs and completion.text == out.text
        assert completion.finish_reason == out.finish_reason == "length"
        assert engine.view(session).tokens == (*ids(10), *out.token_ids)

    def test_messages_stay_with_the_prompt_that_they_became(self, engine: Engine, other: Engine, lab: Lab) -> None:
        """Through forks, cuts, captures and hydrates; a prompt that is cut through has none of them left."""
        told = [Chat(begin=begin, messages=(f'{{"role":"user","content":"{begin}"}}',)) for begin in (0, 14)]
        session = engine.open(seed=3)
        engine.append(session, ids(10), text="ten", role="user", chat=told[0]).result(LIMIT_S)
        lab.one(engine, session, greedy(4))
        asked = GenerateRequest(session=session, prompt=ids(6, 1), role="user", chat=told[1], sampling=greedy(4))
        engine.generate([asked]).result(LIMIT_S)
        captured = lab.capture(engine, session)
        assert [turn.start for turn in captured.turns] == [0, 10, 14, 20]
        for at, kept in ((24, 2), (22, 2), (20, 2), (17, 1), (14, 1), (12, 1), (10, 1), (7, 0)):
            for where, child in (
                (engine, lab.twin(engine, session, at=at)),
                (other, lab.hydrate(other, lab.plan(captured, at=at)).session),
            ):
                turns = where.view(child).turns
                assert [turn.chat for turn in turns if isinstance(turn, ChatTurn)] == told[:kept]
                assert turns[-1].end == at
        again = lab.move(other, lab.move(engine, session, other), engine)
        assert engine.view(again).turns == engine.view(session).turns

    def test_park_and_return(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 300)
        twin, before = lab.twin(engine, session), lab.capture(engine, session)
        parked = engine.park(session).result(LIMIT_S)
        assert parked.parked and parked.tokens == ids(300)
        assert blob_ids(lab.capture(engine, session)) == blob_ids(before)
        engine.park(session).result(LIMIT_S)
        same(lab.one(engine, session, seeded(8)), lab.one(engine, twin, seeded(8)))
        assert not engine.view(session).parked

    def test_a_parked_sessions_fork_leaves_it_as_it_was(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 300)
        child = lab.twin(engine, session)
        engine.park(session).result(LIMIT_S)
        expected = lab.one(engine, child, seeded(8))
        same(expected, lab.one(engine, lab.twin(engine, session), seeded(8)))
        same(expected, lab.one(engine, session, seeded(8)))

    def test_parking_twice_is_fine(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 40)
        engine.park(session).result(LIMIT_S)
        engine.park(session).result(LIMIT_S)
        assert engine.view(session).parked
        assert len(lab.one(engine, session, greedy(2)).token_ids) == 2

    def test_cancel_keeps_the_tokens_and_the_turn_can_be_resumed(self, engine: Engine, lab: Lab) -> None:
        prompt = lab.begin(engine, 60)
        session, out, expected = lab.stopped_amid(engine, prompt, after=4)
        view = engine.view(session)
        assert view.tokens == (*ids(60), *out.token_ids) and not view.running
        assert out.token_ids == expected.token_ids[: len(out.token_ids)]
        same(expected, lab.resume(engine, session)[0])

    def test_a_cancelled_turn_may_be_left_behind(self, engine: Engine, lab: Lab) -> None:
        session, _, _ = lab.stopped_amid(engine, lab.begin(engine, 60), after=1)
        assert len(lab.one(engine, session, greedy(3), (1, 2)).token_ids) == 3
        completions = [turn for turn in engine.view(session).turns if turn.kind == "completion"]
        assert [turn.finish_reason for turn in completions] == ["abort", "length"]

    def test_cancelling_a_prefill_keeps_what_was_read(self, engine: Engine, lab: Lab) -> None:
        """Whenever the cancel comes, the session continues from what it has."""
        session, prompt = engine.open(seed=1), ids(self.long_prompt)
        handle = engine.append(session, prompt, role="user", chat=Chat(begin=0, messages=("{}",)))
        handle.cancel()
        outcome = _outcome(handle)
        assert outcome is None or isinstance(outcome, Cancelled)
        view = engine.view(session)
        assert view.tokens == prompt[: len(view.tokens)] and kv_complete(engine, view.num_kv, len(view.tokens))
        messages = [turn for turn in view.turns if isinstance(turn, ChatTurn)]
        assert len(messages) == (view.tokens == prompt), "half a prompt has no messages"
        if view.tokens:
            assert len(lab.one(engine, session, greedy(2)).token_ids) == 2
        assert len(lab.one(engine, session, greedy(2), (3,)).token_ids) == 2

    def test_a_fork_and_a_capture_in_the_middle_of_a_prefill_go_on(
        self, engine: Engine, other: Engine, lab: Lab
    ) -> None:
        """With "prefill-progress" both have what was read so far; without it a fork has all of the prompt or none."""
        prompt, progress = ids(self.long_prompt), can(engine, "prefill-progress")
        for _ in range(5):  # an engine may be done before this thread gets its turn
            session = engine.open(seed=1)
            handle = engine.append(session, prompt)
            if not progress or _seen_in_the_middle(engine, session, handle, len(prompt)):
                break
        else:
            raise AssertionError("the engine declares prefill-progress, and showed none")
        child = lab.fork(engine, session, replay=True)[0]
        captured = lab.capture(engine, session)
        assert handle.result(LIMIT_S).tokens == engine.view(session).tokens == prompt
        assert kv_complete(engine, captured.num_kv, len(captured.tokens)), "nothing is in it that was not read"
        for where, ref in ((engine, child), (other, lab.hydrate(other, lab.plan(captured)).session)):
            view = where.view(ref)
            count = len(view.tokens)
            assert 0 < count <= len(prompt) if progress else where is other or count in (0, len(prompt))
            assert view.tokens == prompt[:count] and not view.running
            assert len(lab.one(where, ref, greedy(2), () if count else (3,)).token_ids) == 2

    def test_a_running_session_is_busy(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 60)
        handle = lab.start(engine, session, sampling=seeded(self.long_answer))
        next(iter(handle))
        assert engine.view(session).running
        for attempt in (
            lambda: engine.append(session, (1,)).result(LIMIT_S),
            lambda: lab.one(engine, session, greedy(1)),
            lambda: engine.park(session).result(LIMIT_S),
        ):
            with pytest.raises(Busy):
                attempt()
        handle.cancel()
        out = handle.result(LIMIT_S)[0]
        assert len(out.token_ids) < self.long_answer, "the session was not running any more while it was tried"
        assert lab.one(engine, session, greedy(1), (1,)).token_ids

    def test_a_result_that_takes_too_long_can_be_waited_for_again(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 60)
        handle = lab.start(engine, session, sampling=seeded(100))
        with pytest.raises(TimedOut):
            handle.result(0.0)
        assert handle.result(LIMIT_S) is handle.result(LIMIT_S) and handle.done()

    def test_callbacks_run_once_and_also_after_the_end(self, engine: Engine, lab: Lab) -> None:
        called: list[object] = []
        ended = threading.Event()

        def callback(done: object) -> None:
            called.append(done)
            ended.set()

        handle = lab.start(engine, lab.begin(engine, 20), sampling=greedy(3))
        handle.add_done_callback(callback)
        handle.result(LIMIT_S)
        assert ended.wait(LIMIT_S)
        handle.add_done_callback(called.append)
        assert called == [handle, handle]

    def test_too_many_tokens_are_refused_before_any_work(self, load: Load, lab: Lab) -> None:
        engine = load(max_model_len=64)
        session = engine.open(seed=1)
        with pytest.raises(TooLong, match="64"):
            engine.append(session, ids(65)).result(LIMIT_S)
        assert engine.view(session).tokens == ()
        engine.append(session, ids(60)).result(LIMIT_S)
        with pytest.raises(TooLong, match="64"):
            lab.one(engine, session, greedy(4), ids(4))
        out = lab.one(engine, session, greedy(50))
        assert (len(out.token_ids), out.finish_reason) == (4, "length")
        with pytest.raises(TooLong):
            lab.one(engine, session, greedy(1))

    @pytest.mark.parametrize("bad", [-1, 1 << 31, 1 << 63])
    def test_tokens_outside_the_vocabulary_are_refused(self, engine: Engine, lab: Lab, bad: int) -> None:
        session = lab.begin(engine, 10)
        for attempt in (
            lambda: engine.append(session, (1, bad)).result(LIMIT_S),
            lambda: lab.one(engine, session, greedy(1), (bad,)),
        ):
            with pytest.raises(InvalidRequest, match=str(bad)):
                attempt()
        assert engine.view(session).tokens == ids(10)
        with pytest.raises(InvalidRequest):
            engine.append(session, (engine.info.vocab_size,)).result(LIMIT_S)

    def test_requests_that_cannot_work_are_refused_and_touch_nothing(self, engine: Engine, lab: Lab) -> None:
        session, empty = lab.begin(engine, 10), engine.open()
        ask = GenerateRequest
        bad_batches: tuple[list[GenerateRequest], ...] = (
            [],
            [ask(session=session, sampling=greedy(1)), ask(session=session, sampling=greedy(1))],
            [ask(session=session, sampling=greedy(1)), ask(session=empty, sampling=greedy(1))],
            [ask(session=session)],
            [ask(session=session, resume=True)],
            [ask(session=session, resume=True, sampling=greedy(1))],
            [ask(session=session, sampling=greedy(1)), ask(session=SessionRef("nobody"), sampling=greedy(1))],
        )
        for batch in bad_batches:
            with pytest.raises(InvalidRequest):
                engine.generate(batch).result(LIMIT_S)
        assert engine.view(session).tokens == ids(10) and not engine.view(session).running
        assert lab.one(engine, session, greedy(1)).token_ids

    @pytest.mark.parametrize("at", [-1, 11])
    def test_a_fork_outside_the_session_is_refused(self, engine: Engine, lab: Lab, at: int) -> None:
        with pytest.raises(InvalidRequest, match=str(at)):
            lab.fork(engine, lab.begin(engine, 10), at=at)

    def test_bad_forks_and_seeds_are_refused(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 10)
        for options in ({"n": 0}, {"n": 2, "seeds": [1]}, {"n": 1, "seeds": [-1]}, {"n": 1, "seeds": [1 << 64]}):
            with pytest.raises(InvalidRequest):
                lab.fork(engine, session, **options)
        for seed in (-1, 1 << 64):
            with pytest.raises(InvalidRequest):
                engine.open(seed=seed)

    def test_a_fork_at_zero_is_an_empty_session(self, engine: Engine, lab: Lab) -> None:
        child = lab.fork(engine, lab.begin(engine, 10), at=0)[0]
        assert engine.view(child).tokens == () and engine.view(child).turns == ()
        assert lab.one(engine, child, greedy(2), ids(5)).token_ids

    def test_an_empty_session_is_captured_and_comes_back(self, engine: Engine, other: Engine, lab: Lab) -> None:
        session = lab.move(engine, engine.open(seed=9), other)
        assert other.view(session).tokens == () and other.view(session).seed == 9
        assert lab.one(other, session, greedy(2), ids(5)).token_ids

    def test_a_closed_session_is_not_found_and_closing_twice_is_fine(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 10)
        engine.close_session(session)
        engine.close_session(session)
        for attempt in _verbs(engine, session, lab):
            with pytest.raises(NotFound):
                attempt()

    def test_closing_a_running_session_stops_it_and_not_its_batch(self, engine: Engine, lab: Lab) -> None:
        one, two = lab.begin(engine, 30), lab.begin(engine, 30, start=1)
        handle = engine.generate([*lab.ask([one], seeded(self.long_answer)), *lab.ask([two], seeded(60))])
        when(handle, 6, lambda: engine.close_session(one))
        first, second = handle.result(LIMIT_S)
        assert first.finish_reason == "abort" and len(first.token_ids) < self.long_answer
        assert second.finish_reason == "length" and len(second.token_ids) == 60

    def test_closing_the_engine_ends_what_runs_and_what_waits(self, load: Load, lab: Lab) -> None:
        """Nothing hangs: every handle that was given out is settled. Engines are context managers: leaving closes."""
        with load() as engine:
            running, waiting = lab.begin(engine, 30), [lab.begin(engine, 30) for _ in range(4)]
            handle = lab.start(engine, running, sampling=seeded(self.long_answer))
            next(iter(handle))
            pending: list[Handle[Any]] = []
            for session in waiting:
                pending.append(lab.start(engine, session, sampling=seeded(self.long_answer)))
                pending.append(engine.append(session, ids(5)))
        with pytest.raises(EngineDied):
            engine.open()
        engine.close()
        engine.close()
        assert isinstance(_outcome(handle), EngineDied)
        assert all(isinstance(_outcome(one), (EngineDied, Busy)) for one in pending)
        for attempt in _verbs(engine, running, lab):
            with pytest.raises(EngineDied):
                attempt()


def _verbs(engine: Engine, session: SessionRef, lab: Lab) -> list[Callable[[], object]]:
    return [
        lambda: engine.view(session),
        lambda: engine.append(session, (1,)).result(LIMIT_S),
        lambda: lab.one(engine, session, greedy(1)),
        lambda: lab.fork(engine, session),
        lambda: lab.capture(engine, session),
        lambda: engine.park(session).result(LIMIT_S),
    ]


def _seen_in_the_middle(engine: Engine, session: SessionRef, handle: Handle[Any], num_tokens: int) -> bool:
    while not handle.done():
        if 0 < len(engine.view(session).tokens) < num_tokens:
            return True
        time.sleep(0)
    return False


def _outcome(handle: Handle[Any]) -> ThawError | None:
    """What a handle raised; a handle that never settles fails here."""
    try:
        handle.result(LIMIT_S)
    except TimedOut as error:
        raise AssertionError("a handle was never settled") from error
    except ThawError as error:
        return error
    return None
