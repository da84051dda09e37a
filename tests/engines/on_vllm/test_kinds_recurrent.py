"""Models with recurrent layers on vLLM: delta rules (GDN), short convolutions and Mamba2, beside full attention; one of
them is the text part of a multimodal class, with a drafter in its files.

A session goes on where a state of it is kept: at the ends of its turns, and where it was captured. There it has the
bits of the parent that was never interrupted, in the engine that read it and in a new process. The controls must show:
the state of a token more or less, a sibling's, channels in another order.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("vllm")

import torch
from vllm_models import make_for_vllm, options_of
from vllm_shapes import RECURRENT

import thaw
from thaw.core.cache import PointState, point_groups, token_groups
from thaw.core.errors import Busy, Cancelled, InvalidRequest, NotKept, StaleSession, Unsupported
from thaw.engines import load_engine
from thaw.engines.base import Captured, Engine, HydratePlan, SessionRef
from thaw.engines.vllm import versions
from thaw.engines.vllm.jobs import RECENT_STATES
from thaw.engines.vllm.recurrent import NO_MATRICES
from thaw.testing.laws.kit import SEED, Lab, bits, greedy, ids, seeded, until, wait_for
from thaw.testing.plans import capture_plan, mount_at

if not versions.names_failed_loads():
    pytest.skip("releases before 0.32 end where a load of such a model fails", allow_module_level=True)

MORE = pytest.mark.slow("the same on one more model, or without the prefix cache")
ONCE_MORE = pytest.mark.soak("the same on one more model of the kind", receipt="vllm-recurrent-once-more")
CACHING = [
    pytest.param(("qwen3_next", True, True), id="gdn"),
    pytest.param(("lfm2", True, False), id="short-convolution"),
    pytest.param(("qwen3_5", True, False), id="gdn-in-a-multimodal-class", marks=MORE),
    pytest.param(("qwen3_5_text", True, False), id="gdn-of-a-text-model", marks=ONCE_MORE),
    pytest.param(("lfm2_moe", True, False), id="short-convolution-with-experts", marks=ONCE_MORE),
]
MODELS = [
    *CACHING,
    pytest.param(("qwen3_next", False, False), id="gdn-without-prefix-cache", marks=MORE),
    pytest.param(("lfm2", False, True), id="short-convolution-without-prefix-cache", marks=MORE),
    pytest.param(("granitemoehybrid", False, True), id="mamba2"),
    pytest.param(("qwen3_5_moe", False, False), id="gdn-with-experts-in-a-multimodal-class", marks=ONCE_MORE),
    pytest.param(("nemotron_h", False, False), id="mamba2-and-plain-layers", marks=ONCE_MORE),
    pytest.param(("falcon_h1", False, False), id="mamba2-and-attention-in-each-layer", marks=ONCE_MORE),
    pytest.param(("zamba2", False, False), id="mamba2-and-shared-attention", marks=ONCE_MORE),
]
"""A model; whether vLLM's prefix cache is on, for its blocks of states are others then; whether sessions are restored
by another engine, in processes of its own, or by the one that read them. Its pages hold NaN then in any case."""
ANSWER = 24
ENDS, FEWER_ENDS = (37, 255, 256, 257, 300, 700), (37, 256, 257)
"""Tokens after which a state is kept: around a block's end, and elsewhere."""
NOISE_FACTOR, IN_FALCON_H1 = 100, 10
"""Falcon-H1's noise is larger on a processor with AMX, whose bfloat16 kernels differ more by the shape of a batch."""
TOP = 20
WRONG_IN_BATCHES = ("lfm2", "lfm2_moe")
"""vLLM 0.32 on a CPU computes three equal prompts of these in one batch as three unequal ones, by several units of log
probability, without thaw as well: that is no noise to compare with, and what runs alone is exact."""
CLOSE, FAR = 0.02, 0.3
"""How far two engines' kernels may be apart in bfloat16, in parts of the state's size; a stranger's is farther."""
FLOOR = 1e-6
"""Less than what float32 holds of a log probability is no noise."""


Boot = Callable[..., Engine]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of blocks that are shared are of the models with a prefix cache. These come first, so that what boots an
    engine for a model goes by one order for all tests."""
    if "how" in metafunc.fixturenames:
        models = CACHING if "shared_block" in metafunc.fixturenames else MODELS
        metafunc.parametrize("how", models, indirect=True, scope="module")


@pytest.fixture(scope="module")
def how(request: pytest.FixtureRequest) -> tuple[str, bool, bool]:
    arch, caches, apart = request.param
    return arch, caches, apart


@pytest.fixture(scope="module")
def folder(how: tuple[str, bool, bool], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_for_vllm(how[0], tmp_path_factory.mktemp("made") / how[0])


@pytest.fixture(scope="module")
def boot(how: tuple[str, bool, bool], folder: Path) -> Boot:
    def start(**more: Any) -> Engine:
        own = options_of(how[0], enable_prefix_caching=how[1], **{"num_gpu_blocks_override": 120, **more})
        return load_engine("vllm", model=str(folder), **own, worker_extension_cls="scrubbing.Scrub")

    return start


@pytest.fixture(scope="module")
def engine(boot: Boot) -> Iterator[Engine]:
    with boot() as running:
        yield running


@pytest.fixture(scope="module")
def other(how: tuple[str, bool, bool], boot: Boot, engine: Engine) -> Iterator[Engine]:
    """Where sessions are restored."""
    if not how[2]:
        yield engine
        return
    with boot() as running:
        yield running


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


def fill_with_nan(engine: Engine) -> None:
    """vLLM knows of no block any more, and each holds NaN."""
    llm = engine._transport._llm  # type: ignore[attr-defined]
    until(lambda: bool(engine._loop.wait(llm.reset_prefix_cache())), limit_s=20.0)  # type: ignore[attr-defined]
    assert all(nbytes > 0 for nbytes in engine.collective_rpc("fill_with_nan"))  # type: ignore[attr-defined]


def test_what_was_stored_anywhere_goes_on_with_the_parents_bits(
    how: tuple[str, bool, bool], engine: Engine, other: Engine, lab: Lab
) -> None:
    """At a prompt's end and in the middle of an answer, on both sides of a block's end."""
    for end in ENDS if how[2] else FEWER_ENDS:
        session = lab.begin(engine, end + 1, start=end)
        assert engine.view(session).num_kv == end
        whole = lab.one(engine, lab.twin(engine, session), greedy(ANSWER))
        for more in (0, 1, 9):
            part = lab.twin(engine, session)
            if more:
                lab.one(engine, part, greedy(more))
            plan = lab.plan(lab.capture(engine, part))
            fill_with_nan(other)
            restored = lab.hydrate(other, plan)
            assert restored.proof.num_cached_tokens == end + more and restored.proof.num_recomputed_tokens == 0
            rest = lab.one(other, restored.session, greedy(ANSWER - more))
            assert rest.usage.num_prefilled_tokens == 1, (end, more)
            assert rest.token_ids == whole.token_ids[more:], (end, more)
            assert bits(rest.logprobs) == bits(whole.logprobs)[more:], (end, more)


def test_an_answer_that_is_captured_while_it_runs_goes_on_with_its_bits(
    engine: Engine, other: Engine, lab: Lab
) -> None:
    session = lab.begin(engine, 300)
    captured, whole = lab.captured_amid(engine, session)
    plan = lab.plan(captured)
    assert plan.num_kv == len(plan.tokens) - 1
    done = plan.num_kv + 1 - 300
    (rest,) = lab.resume(other, lab.hydrate(other, plan).session)
    assert rest.token_ids[done:] == whole.token_ids[done:] and bits(rest.logprobs)[done:] == bits(whole.logprobs)[done:]


def test_children_of_one_point_are_one_another_and_the_parent(engine: Engine, lab: Lab) -> None:
    """Forked at a prompt's end and from the middle of an answer, each runs by itself, as the parent; and those that are
    asked for together begin in one step."""
    session = lab.begin(engine, 261)
    whole = lab.one(engine, lab.twin(engine, session), seeded(ANSWER))
    for child in engine.fork(session, 3, replay=True).result():
        out = lab.one(engine, child, seeded(ANSWER))
        assert bits(out.logprobs) == bits(whole.logprobs) and out.usage.num_prefilled_tokens == 1
    split = engine.stats()["split_groups"]
    engine.generate(lab.ask(engine.fork(session, 5).result(), greedy(2))).result()
    assert engine.stats()["split_groups"] == split
    lab.one(engine, session, seeded(9))
    before = engine.stats()
    for child in engine.fork(session, 6).result():
        assert engine.view(child).num_kv == 261 + 8
        engine.append(child, ids(3, 5)).result()
    found = {name: engine.stats()[name] - before[name] for name in ("loaded_tokens", "hit_tokens")}
    assert sum(found.values()) == 6 * (261 + 8) and found["loaded_tokens"] > 0


@pytest.fixture
def shared_block(how: tuple[str, bool, bool], engine: Engine) -> int:
    """Tokens in a block of vLLM's, where sessions find blocks of their own in its cache."""
    assert how[1], "vLLM has no prefix cache here"
    return int(engine.info.numerics["block_size"])


def full_blocks(tokens: Sequence[int], block: int) -> int:
    """How many of a session's tokens lie in full blocks. Its last one is not read yet."""
    return (len(tokens) - 1) // block * block


def test_siblings_share_the_full_blocks_of_their_point(shared_block: int, engine: Engine, lab: Lab) -> None:
    """Each has a tail block of its own and a block for the state of each of vLLM's groups, and loads no more than that;
    also where a point is at a block's end, of which the last one is always loaded, with its state."""
    block, count = shared_block, 6
    tables = sum(group.num_layers for group in point_groups(engine.info.groups))
    for end in (2 * block, 2 * block + 1, 3 * block - 1):
        session = lab.begin(engine, end + 1, start=end)
        whole = lab.one(engine, lab.twin(engine, session), greedy(ANSWER))
        full, free, before = (end - 1) // block, settled(engine), engine.stats()
        children = engine.fork(session, count).result()
        running = [engine.generate(lab.ask([child], greedy(600))) for child in children]
        for one in running:
            wait_for(one, 2)
        now = engine.stats()
        assert now["running"] == count
        assert now["hit_tokens"] - before["hit_tokens"] == count * full * block
        assert now["loaded_tokens"] - before["loaded_tokens"] == count * (end - full * block)
        assert free - now["free_blocks"] <= full + count * (1 + 1 + 2 * tables)
        for one in running:
            one.cancel()
            one.result()
        before = engine.stats()["hit_tokens"]
        alone = lab.one(engine, lab.twin(engine, session), greedy(ANSWER))
        assert bits(alone.logprobs) == bits(whole.logprobs), end
        assert engine.stats()["hit_tokens"] - before == full * block
        for child in children:
            engine.close_session(child)


def test_a_hit_that_is_not_the_sessions_own_is_never_extended(
    how: tuple[str, bool, bool], shared_block: int, engine: Engine, lab: Lab
) -> None:
    """Two sessions of the same tokens and one salt whose prompts were cut elsewhere: vLLM calls their blocks equal, and
    their bits are not. The child of each has its own parent's."""
    block = shared_block
    tokens = ids(2 * block + 40)
    one, two = engine.open(seed=SEED), engine.open(seed=SEED)
    engine._get(two).cache_salt = engine._get(one).cache_salt  # type: ignore[attr-defined]
    engine.append(one, tokens).result()
    for start, end in pairwise((0, 77, block + 30, len(tokens))):
        engine.append(two, tokens[start:end]).result()
    first, second = (lab.capture(engine, session) for session in (one, two))
    assert first.segments[0].blobs != second.segments[0].blobs, "or there is nothing to mistake"
    restored = [lab.hydrate(engine, lab.plan(captured)).session for captured in (first, second)]
    asked = greedy(1, logprobs=TOP)
    expected = [_row(lab.one(engine, session, asked)) for session in restored]
    assert how[0] in WRONG_IN_BATCHES or expected[0] != expected[1], "there the hits alone show it"
    before = engine.stats()["hit_tokens"]
    for session, right in zip((one, two), expected, strict=True):
        assert _row(lab.one(engine, lab.twin(engine, session), asked)) == right
    assert engine.stats()["hit_tokens"] - before == full_blocks(tokens, block), "of the one whose blocks vLLM finds"


def test_a_pin_holds_a_sessions_full_blocks(shared_block: int, engine: Engine, lab: Lab) -> None:
    """Through what pushes all others out, and no longer than was asked for. Its state is in the arena in any case."""
    block = shared_block
    session = lab.begin(engine, 2 * block + 40)
    whole = lab.one(engine, lab.twin(engine, session), greedy(ANSWER))
    pinned = engine.pin(session, 60.0).result()  # type: ignore[attr-defined]
    assert pinned == full_blocks(engine.view(session).tokens, block) == block * engine.stats()["pinned_blocks"] > 0
    others = settled(engine) // (1999 // block) + 2  # each leaves as many full blocks in the cache
    for held in (True, False):
        if not held:
            assert engine.pin(session, 0.0).result() == 0  # type: ignore[attr-defined]
        for other in range(others):
            engine.close_session(lab.begin(engine, 2000, start=100 + other))
        before = engine.stats()["hit_tokens"]
        assert bits(lab.one(engine, lab.twin(engine, session), greedy(ANSWER)).logprobs) == bits(whole.logprobs)
        assert engine.stats()["hit_tokens"] - before == (pinned if held else 0)
    assert engine.stats()["pinned_blocks"] == 0


def test_a_live_session_of_twenty_turns_reads_new_tokens_alone(engine: Engine, lab: Lab) -> None:
    session = engine.open(seed=SEED)
    for turn in range(20):
        engine.append(session, ids(7 + turn, turn)).result()
        out = lab.one(engine, session, greedy(5))
        assert out.usage.num_prefilled_tokens == 1
        assert engine.view(session).num_kv == len(engine.view(session).tokens) - 1
    again = engine.open(seed=SEED)
    tokens, replies = engine.view(session).tokens, engine.view(session).turns
    for turn in replies:  # every turn by itself, and the same bits
        if turn.kind == "prompt":
            engine.append(again, tokens[turn.start : turn.end]).result()
        else:
            out = lab.one(engine, again, greedy(turn.end - turn.start))
            assert bits(out.logprobs) == bits(turn.logprobs or ())


def test_an_answer_that_its_client_ends_can_be_gone_on_from(engine: Engine, lab: Lab) -> None:
    """A stop string and a cancel: the engine may have gone on for some steps."""
    session = lab.begin(engine, 300)
    whole = lab.one(engine, lab.twin(engine, session), greedy(ANSWER))
    text = engine.codec.decode(whole.token_ids)
    stop = next(text[at : at + 2] for at in range(3, len(text) - 2))
    stopped = lab.twin(engine, session)
    out = lab.one(engine, stopped, greedy(ANSWER, stop=(stop,)))
    done = len(out.token_ids)
    assert out.finish_reason == "stop" and done < ANSWER
    assert engine.view(stopped).num_kv == 300 + done - 1
    captured = lab.capture(engine, stopped)
    rest = lab.one(engine, lab.hydrate(engine, lab.plan(captured)).session, greedy(ANSWER - done))
    assert bits(rest.logprobs) == bits(whole.logprobs)[done:]
    rest = lab.one(engine, stopped, greedy(ANSWER - done))
    assert bits(rest.logprobs) == bits(whole.logprobs)[done:]
    for after in (2, 5, 9):
        cancelled, part, whole = lab.stopped_amid(engine, session, after=after)
        done = len(part.token_ids)
        assert engine.view(cancelled).num_kv == len(engine.view(cancelled).tokens) - 1 == 300 + done - 1
        rest = lab.one(engine, cancelled, seeded(min(ANSWER, len(whole.token_ids) - done)))
        assert bits(rest.logprobs) == bits(whole.logprobs)[done:][: len(rest.token_ids)]


def test_a_state_is_copied_where_somebody_needs_it_and_not_behind_every_step(engine: Engine, lab: Lab) -> None:
    """At an end and at a capture; behind every step only of a request with stop strings, which its client may end some
    steps late. What runs without holds no state in the arena but those that it began with."""
    states = sum(group.nbytes for group in point_groups(engine.info.groups))

    def copies(before: int = 0) -> int:
        return engine.stats()["state_copies"] - before

    before = copies()
    session = lab.begin(engine, 40)
    assert copies(before) == 1
    twin, before = lab.twin(engine, session), copies()
    lab.one(engine, twin, greedy(ANSWER))
    assert copies(before) == 1
    before = copies()
    lab.captured_amid(engine, session, samplings=(greedy(1500),))
    assert copies(before) == 2
    stopped, before = lab.twin(engine, session), copies()
    lab.one(engine, stopped, greedy(ANSWER, stop=("\x00 never said \x00",)))
    assert copies(before) == ANSWER
    held = {}
    for stop in ((), ("\x00 never said \x00",)):
        child, before = lab.twin(engine, session), engine.stats()["arena_nbytes"]
        running = lab.start(engine, child, sampling=greedy(1500, stop=stop))
        wait_for(running, 12)
        now = engine.stats()
        running.cancel()
        running.result()
        assert now["running"] == 1
        held[stop] = (now["arena_nbytes"] - before) / states
        engine.close_session(child)
    assert list(held.values()) == [0, RECENT_STATES]


def test_captures_of_an_answer_on_both_sides_of_a_blocks_end_go_on_with_its_bits(engine: Engine, lab: Lab) -> None:
    """One after another while it runs: each has the state of the step before it, whichever block that lies in."""
    session, count = lab.begin(engine, 250), 400
    whole = lab.one(engine, lab.twin(engine, session), greedy(count))
    twin = lab.twin(engine, session)
    running = lab.start(engine, twin, sampling=greedy(count))
    wait_for(running, 1)
    plans: dict[int, HydratePlan] = {}
    while engine.view(twin).running and len(plans) < 12:
        plan = lab.plan(lab.capture(engine, twin))
        plans[plan.num_kv] = plan
    running.result()
    assert len(plans) >= 3
    for num_kv in sorted(plans)[:6]:
        done = num_kv + 1 - 250
        restored = lab.hydrate(engine, plans[num_kv]).session
        if done < count:
            (rest,) = lab.resume(engine, restored)
            assert bits(rest.logprobs)[done:] == bits(whole.logprobs)[done:], num_kv
        engine.close_session(restored)


def test_a_session_that_ended_by_itself_keeps_the_states_of_its_turns_alone(engine: Engine, lab: Lab) -> None:
    """The states of the last steps before an end are released, unless the client may have ended it at one of them."""
    states = sum(group.nbytes for group in point_groups(engine.info.groups))
    tokens = sum(group.token_nbytes for group in token_groups(engine.info.groups))

    def kept(session: SessionRef, before: int, prompt: int) -> float:
        return (engine.stats()["arena_nbytes"] - before - tokens * (engine.view(session).num_kv - prompt)) / states

    before = engine.stats()["arena_nbytes"]
    session = lab.begin(engine, 40)
    lab.one(engine, session, greedy(ANSWER))
    assert kept(session, before, 0) == 2  # after its prompt, and after its answer
    before = engine.stats()["arena_nbytes"]
    child = lab.twin(engine, session)
    lab.one(engine, child, greedy(ANSWER, stop=("\x00 never said \x00",)))
    assert kept(child, before, 40 + ANSWER - 1) > 2, "or the measure above shows nothing"


def test_a_prompt_that_was_stopped_before_its_answer_is_read_by_whoever_goes_on(engine: Engine, lab: Lab) -> None:
    session, prompt = lab.begin(engine, 600), ids(300, 4)
    whole = lab.one(engine, lab.twin(engine, session), greedy(ANSWER), prompt)
    before_a_token = 0
    for trial in range(12):
        stopped = lab.twin(engine, session)
        running = lab.start(engine, stopped, sampling=greedy(ANSWER), prompt=prompt)
        time.sleep(0.01 * trial)  # before it began, and inside each of its steps
        running.cancel()
        done = len(running.result(60.0)[0].token_ids)
        assert len(engine.view(stopped).tokens) == 900 + done
        if done == 0:
            before_a_token += 1
            restored = lab.hydrate(engine, lab.plan(lab.capture(engine, stopped))).session
            for child in (restored, lab.twin(engine, stopped)):
                assert bits(lab.one(engine, child, greedy(ANSWER)).logprobs) == bits(whole.logprobs)
                engine.close_session(child)
        if done < ANSWER:
            rest = lab.one(engine, stopped, greedy(ANSWER - done))
            assert bits(rest.logprobs) == bits(whole.logprobs)[done:]
        engine.close_session(stopped)
    assert before_a_token


def test_where_no_state_is_kept_the_refusal_names_those_that_are(engine: Engine, lab: Lab) -> None:
    session = lab.begin(engine, 100)
    lab.one(engine, session, greedy(5))
    with pytest.raises(NotKept, match=r"no state is kept after 49 tokens.*states after 99, 104 tokens.*`reread`"):
        engine.fork(session, 1, at=50).result()
    (child,) = engine.fork(session, 1, at=100, replay=True).result()
    assert engine.view(child).num_kv == 99
    (again,) = engine.fork(session, 1, at=105).result()
    assert engine.view(again).num_kv == 104
    assert not {"interior-points", "fork-running"} & engine.info.capabilities and "pin" in engine.info.capabilities


POINTS = (128, 256, 320)
"""Multiples of what every kernel reads at a time, on a block's end and elsewhere."""


def read_with(engine: Engine, points: Sequence[int], *, count: int = 400, unaligned: bool = False) -> SessionRef:
    """A session that was asked for states after `points` and has read `count` tokens."""
    session = engine.open(seed=SEED)
    engine.keep_points(session, points, unaligned=unaligned)
    engine.append(session, ids(count)).result()
    return session


def read_in_pieces(engine: Engine, ends: Sequence[int]) -> SessionRef:
    """A session that stopped at each of `ends`, an append each, so that there is a state after as many tokens."""
    session, at = engine.open(seed=SEED), 0
    for end in ends:
        engine.append(session, ids(ends[-1] + 1)[at : end + 1]).result()
        at = end + 1
    return session


def test_points_asked_for_ahead_are_those_of_a_parent_that_stopped_there(
    engine: Engine, other: Engine, lab: Lab
) -> None:
    """Inside one append: every byte of its KV and its states, and what goes on from any of them here and elsewhere."""
    asked = read_with(engine, POINTS)
    whole = lab.capture(engine, asked)
    stopped = read_in_pieces(engine, (*POINTS, 399))
    assert whole.segments == lab.capture(engine, stopped).segments
    assert [point.token for s in whole.segments for point in s.points] == [*POINTS, 399]
    later = lab.capture(engine, read_with(engine, [POINTS[0] + 1], unaligned=True))
    assert _state_of(later, POINTS[0] + 1) != _state_of(whole, POINTS[0]), "or equal blobs show nothing"
    for point in POINTS:
        child, twin = (lab.twin(engine, parent, at=point + 1) for parent in (asked, stopped))
        assert engine.view(child).num_kv == point
        answer = lab.one(engine, child, greedy(ANSWER), ids(70, 5))
        assert answer.usage.num_prefilled_tokens == 71
        assert bits(answer.logprobs) == bits(lab.one(engine, twin, greedy(ANSWER), ids(70, 5)).logprobs)
        restored = lab.hydrate(other, lab.plan(whole, at=point + 1)).session
        again = lab.one(other, restored, greedy(ANSWER), ids(70, 5))
        assert again.usage.num_prefilled_tokens == 71 and bits(again.logprobs) == bits(answer.logprobs)


def test_points_of_a_prompt_that_is_answered_and_of_its_answer_are_passed_by(engine: Engine, lab: Lab) -> None:
    """Those inside the prompt are stopped at; a step of an answer ends at every token, so nothing changes there."""
    prompt, end = ids(400), 400
    twin = read_in_pieces(engine, (128,))
    expected = lab.one(engine, twin, greedy(ANSWER), prompt[129:])
    session = engine.open(seed=SEED)
    asked = (128, end, end + 3, end + 9, end + ANSWER + 5)
    engine.keep_points(session, asked, unaligned=True)
    out = lab.one(engine, session, greedy(ANSWER), prompt)
    assert bits(out.logprobs) == bits(expected.logprobs) and out.usage.num_prefilled_tokens == end
    captured = lab.capture(engine, session)
    assert [p.token for s in captured.segments for p in s.points] == [128, end, end + 3, end + 9, end + ANSWER - 1]
    for point in asked[1:4]:
        live, stored = lab.twin(engine, session, at=point + 1), lab.plan(captured, at=point + 1)
        for child in (live, lab.hydrate(engine, stored).session):
            assert engine.view(child).num_kv == point
            (rest,) = lab.resume(engine, child)
            assert bits(rest.logprobs) == bits(out.logprobs), point
            engine.close_session(child)


def test_a_state_that_was_asked_for_at_a_prompts_end_comes_when_the_session_goes_on(engine: Engine, lab: Lab) -> None:
    """The last token runs with what follows, and a prompt that follows stops behind it."""
    session = read_with(engine, [256], count=256)
    assert engine.view(session).num_kv == 255 and _points(lab.capture(engine, session)) == [255]
    answered = lab.twin(engine, session)
    engine.append(session, ids(400)[256:]).result()
    assert _points(lab.capture(engine, session)) == [255, 256, 399]
    stopped = read_in_pieces(engine, (255, 256, 399))
    assert lab.capture(engine, session).segments == lab.capture(engine, stopped).segments
    lab.one(engine, answered, greedy(4))
    assert _points(lab.capture(engine, answered)) == [255, 256, 259]


def test_an_append_that_is_cancelled_between_its_points_keeps_what_it_read(engine: Engine, lab: Lab) -> None:
    count = 900
    points = tuple(range(64, count, 64))
    whole = read_with(engine, points, count=count)
    kept = set()
    for trial in range(3):
        session = engine.open(seed=SEED)
        engine.keep_points(session, points)
        reading = engine.append(session, ids(count))
        time.sleep(0.05 * trial)
        reading.cancel()
        with contextlib.suppress(Cancelled):
            reading.result(60.0)
        view = engine.view(session)
        kept.add(view.num_kv)
        assert view.tokens == ids(count)[: len(view.tokens)] and view.num_kv in (0, *points, count - 1)
        engine.append(session, ids(count)[len(view.tokens) :]).result()
        assert lab.capture(engine, session).segments == lab.capture(engine, whole).segments
        engine.close_session(session)
    assert len(kept) > 1, kept


def test_points_that_cannot_be_are_refused_by_name(how: tuple[str, bool, bool], engine: Engine, lab: Lab) -> None:
    session = lab.begin(engine, 100)
    for token, why in ((0, "must be 1 to"), (4096, "must be 1 to"), ("x", "must be 1 to")):
        with pytest.raises(InvalidRequest, match=why):
            engine.keep_points(session, [token])  # type: ignore[list-item]
    if how[0] not in NO_MATRICES:
        with pytest.raises(InvalidRequest, match=r"a point at token 130.*Ask for.*or insist"):
            engine.keep_points(session, [130])
    with pytest.raises(NotKept, match=r"no state is kept after 64 tokens.*states after 99 tokens"):
        engine.keep_points(session, [64])
    engine.keep_points(session, [99], unaligned=True)
    assert "points" in engine.info.capabilities


def test_a_token_that_is_no_point_is_read_again_from_the_nearest_one(engine: Engine, lab: Lab, tmp_path: Path) -> None:
    """A live session's, and a commit's: reported as read again, and with the bits of one that stopped alike."""
    expected = lab.one(engine, read_in_pieces(engine, (128, 199)), greedy(ANSWER))
    with thaw.init(tmp_path / "repository", engine=engine) as repo, repo.session(seed=SEED) as session:
        session.append(token_ids=ids(400), points=[128])
        session.commit("read", branch="main")
        with pytest.raises(NotKept, match=r"after 199 tokens.*states after 128, 399 tokens"):
            session.fork(1, at=200)
        with pytest.raises(NotKept):
            repo.session("main:token=200")
        for again in (session.reread(200), repo.session("main:token=200", policy="recompute")):
            proof = again.proof
            assert proof is not None and not proof.hit and proof.continuation == "close" and proof.reason
            assert (proof.num_cached_tokens, proof.num_recomputed_tokens, proof.first_mismatch) == (128, 72, 128)
            before = engine.stats()["loaded_tokens"]
            first, second = again.fork(2, replay=True)
            for child in (first, second):
                out = child.generate("", greedy(ANSWER))
                assert bits(out.logprobs) == bits(expected.logprobs) and out.usage.num_prefilled_tokens == 1
            assert engine.stats()["loaded_tokens"] - before <= 2 * 199
            branch = f"again-{len(repo.branches())}"
            again.commit("again", branch=branch)
            with repo.session(branch) as stored:
                assert bits(stored.generate("", greedy(ANSWER)).logprobs) == bits(expected.logprobs)


def _state_of(captured: Captured, token: int) -> dict[str, tuple[str, ...]]:
    return next(point.blobs for s in captured.segments for point in s.points if point.token == token)


def _points(captured: Captured) -> list[int]:
    return [point.token for s in captured.segments for point in s.points]


def settled(engine: Engine) -> int:
    """Free blocks, once nothing that has ended holds any: on a GPU an ended request's go back a step later."""
    seen = -1
    while seen != (seen := engine.stats()["free_blocks"]):
        time.sleep(0.2)
    return int(seen)


def test_a_load_that_fails_ends_its_own_request_alone(engine: Engine, lab: Lab) -> None:
    """A client that believes in a state which is not there: the engine refuses by name, and a neighbour goes on."""
    session = lab.begin(engine, 300)
    whole = lab.one(engine, lab.twin(engine, session), greedy(ANSWER))
    liar = lab.begin(engine, 300, start=1)
    engine._get(liar).points += (100,)  # type: ignore[attr-defined]
    (bad,) = engine.fork(liar, 1, at=101).result()
    good = lab.twin(engine, session)
    free = settled(engine)
    running = engine.generate(lab.ask([good], greedy(ANSWER)))
    with pytest.raises(NotKept, match=r"no state is kept after 100 tokens: this session has states after .*299"):
        lab.one(engine, bad, greedy(4))
    assert bits(running.result()[0].logprobs) == bits(whole.logprobs)
    assert settled(engine) == free
    assert bits(lab.one(engine, lab.twin(engine, session), greedy(ANSWER)).logprobs) == bits(whole.logprobs)


def test_controls_that_can_see(how: tuple[str, bool, bool], engine: Engine, lab: Lab) -> None:
    """The state of one token more or less, a sibling's, and channels in another order, part by part: each moves the
    next log probabilities by many times what another shape of the batch does."""
    point = 256
    right, fewer, further = (_captured(engine, lab, point + more) for more in (0, -1, 1))
    sibling = _captured(engine, lab, point, start=3)
    plan = lab.plan(right)
    expected = _next(engine, lab, plan)
    assert expected == _next(engine, lab, plan)
    noise = max(FLOOR, 0.0 if how[0] in WRONG_IN_BATCHES else _batch_noise(engine, lab, plan, expected))
    factor = IN_FALCON_H1 if how[0] == "falcon_h1" else NOISE_FACTOR
    moved: dict[str, float] = {}
    group = point_groups(engine.info.groups)[0]
    at = 0
    for part in group.parts:
        own = slice(at, at + part.num_heads)
        at = own.stop
        for what, stranger in (("n-1", fewer), ("n+1", further), ("sibling", sibling)):
            wrong = _with_state(plan, group, lab.plan(stranger), own)
            moved[f"{part.name} of {what}"] = _far(expected, _next(engine, lab, wrong))
        if part.name.startswith("conv"):
            wrong = _with_state(plan, group, plan, own, backwards=True)
            moved[f"{part.name} in another order"] = _far(expected, _next(engine, lab, wrong))
    weak = {what: far for what, far in moved.items() if not far >= factor * noise}
    assert not weak, f"noise {noise:.2g}"
    assert len(moved) >= 4


def test_snapshots_cross_to_transformers_and_back(
    how: tuple[str, bool, bool], engine: Engine, lab: Lab, folder: Path
) -> None:
    """One identity, and one form: the first layer's state, which depends on tokens alone, is the same in both but for
    rounding, and another session's is not. Each engine continues from the other's."""
    if how[0] == "nemotron_h":
        pytest.skip("transformers 5.19, which vLLM 0.32 wants, has a cache for plain layers, and thaw knows 5.23's")
    point = 300
    with load_engine("transformers", model=str(folder)) as stock:
        assert stock.identity() == engine.identity()
        theirs, ours = _asked(stock, lab, point), lab.plan(_captured(engine, lab, point))
        sibling = lab.plan(_captured(engine, lab, point, start=3))
        for name, state in _first_layer(lab, theirs, engine).items():
            right, wrong = (_first_layer(lab, plan, engine)[name] for plan in (ours, sibling))
            assert _apart(state, right) < CLOSE, name
            assert _apart(state, wrong) > FAR, name
        for there, plan in ((engine, theirs), (stock, ours)):
            restored = lab.hydrate(there, plan)
            assert restored.proof.num_cached_tokens == point
            assert lab.one(there, restored.session, greedy(3)).usage.num_prefilled_tokens == 1


@pytest.mark.parametrize(
    ("arch", "options", "why"),
    [
        ("qwen3_next", {"tensor_parallel_size": 2}, "on one rank alone"),
        ("qwen3_next", {"beside": ["OffloadingConnector"]}, "no other connector"),
        ("granitemoehybrid", {"enable_prefix_caching": True}, "mamba_cache_mode none, not align"),
    ],
)
def test_what_was_not_run_is_refused_by_name(
    arch: str, options: dict[str, Any], why: str, tiny_model: Callable[..., Path]
) -> None:
    folder = tiny_model(arch, dtype="bfloat16", **RECURRENT.get(arch, {}))
    with pytest.raises(Unsupported, match=why):
        load_engine("vllm", model=str(folder), enforce_eager=True, max_model_len=1024, **options)


@MORE
def test_children_that_are_preempted_begin_again_and_stale_ones_end_alone(
    tiny_model: Callable[..., Path], lab: Lab
) -> None:
    """A cache too small for its four children: each computes anew what came after its point. Then the weights change
    under them: a load that fails in the worker ends its own request."""
    folder = tiny_model("qwen3_next", dtype="bfloat16", **RECURRENT["qwen3_next"])
    options = {"enforce_eager": True, "max_model_len": 1024, "num_gpu_blocks_override": 20}
    with load_engine("vllm", model=str(folder), worker_extension_cls="scrubbing.Scrub", **options) as small:
        session = lab.begin(small, 300)
        free = small.stats()["free_blocks"]
        children = small.fork(session, 4).result()
        outs = small.generate(lab.ask(children, seeded(300))).result()
        assert small.stats()["preempted"] > 0
        assert [len(out.token_ids) for out in outs] == [300] * 4 and small.stats()["free_blocks"] == free
        for child in children:
            tokens = small.view(child).tokens
            assert small.view(child).num_kv == len(tokens) - 1
            plan = lab.plan(lab.capture(small, child))
            rest = lab.one(small, lab.hydrate(small, plan).session, greedy(8))
            assert bits(rest.logprobs) == bits(lab.one(small, child, greedy(8)).logprobs)
        good = lab.twin(small, session)
        small.collective_rpc("scale_in_place", ("model.norm.weight", 2.0))  # type: ignore[attr-defined]
        fresh = lab.begin(small, 300)
        running = small.generate(lab.ask([fresh], greedy(64)))
        with pytest.raises(StaleSession):
            lab.one(small, good, greedy(4))
        assert len(running.result()[0].token_ids) == 64 and small.stats()["free_blocks"] == free


@MORE
def test_a_capture_in_the_step_of_a_preemption_is_busy_or_whole(tiny_model: Callable[..., Path], lab: Lab) -> None:
    """vLLM gives the blocks of a preempted request away before anybody can read them. What was asked of them in that
    step is refused as busy; what is captured goes on."""
    folder = tiny_model("qwen3_next", dtype="bfloat16", **RECURRENT["qwen3_next"])
    options = {"enforce_eager": True, "max_model_len": 1024, "num_gpu_blocks_override": 20}
    with load_engine("vllm", model=str(folder), **options) as small:
        session = lab.begin(small, 300)
        captured = 0
        for _ in range(2):
            children = small.fork(session, 4).result()
            running = small.generate(lab.ask(children, seeded(300)))
            wait_for(running, 4)
            while any(small.view(child).running for child in children):
                plans = [capture_plan(lab.mount, 0, 1) for _ in children]
                asked = [small.capture(child, plan) for child, plan in zip(children, plans, strict=True)]
                for promise in asked:
                    with contextlib.suppress(Busy):
                        promise.result(60.0)
                        captured += 1
            running.result()
        assert small.stats()["preempted"] > 0 and captured > 0


def _first_layer(lab: Lab, plan: HydratePlan, engine: Engine) -> dict[str, Any]:
    """Each part of the first recurrent layer's state, all heads."""
    group, (point,) = point_groups(engine.info.groups)[0], plan.points
    found: dict[str, list[Any]] = {}
    for (part, _), place in zip(group.blobs, point.blobs[group.name], strict=True):
        values = torch.frombuffer(bytearray(lab.read(place)), dtype=getattr(torch, part.dtype))
        found.setdefault(part.name, []).append(values.view(group.num_layers, *part.shape)[0].float())
    return {name: torch.stack(heads) for name, heads in found.items()}


def _apart(one: Any, two: Any) -> float:
    """By how much they differ, in parts of their size."""
    return float((one - two).norm() / one.norm())


def _asked(stock: Engine, lab: Lab, num_kv: int, *, start: int = 0) -> HydratePlan:
    """A state of an engine that keeps those that were asked for."""
    session = stock.open(seed=SEED)
    stock.keep_points(session, (num_kv,), unaligned=True)
    stock.append(session, ids(num_kv + 2, start)).result()
    return lab.plan(lab.capture(stock, session), at=num_kv + 1)


def _captured(engine: Engine, lab: Lab, num_kv: int, *, start: int = 0) -> Captured:
    return lab.capture(engine, lab.begin(engine, num_kv + 1, start=start))


def _with_state(
    plan: HydratePlan, group: PointState, donor: HydratePlan, blobs: slice, *, backwards: bool = False
) -> HydratePlan:
    """The plan with some blobs of its state taken from another's."""
    (mine,), (theirs,) = plan.points, donor.points
    places, strange = list(mine.blobs[group.name]), list(theirs.blobs[group.name])[blobs]
    places[blobs] = strange[::-1] if backwards else strange
    return msgspec.structs.replace(plan, points=(type(mine)(token=mine.token, blobs={group.name: tuple(places)}),))


def _next(engine: Engine, lab: Lab, plan: HydratePlan) -> dict[int, float]:
    """Log probabilities after the plan's last token."""
    return _row(lab.one(engine, lab.hydrate(engine, plan).session, greedy(1, logprobs=TOP)))


def _row(completion: Any) -> dict[int, float]:
    return dict(completion.top_logprobs[0])


def _batch_noise(engine: Engine, lab: Lab, plan: HydratePlan, alone: dict[int, float]) -> float:
    """How far the same row lies off in batches of other shapes."""
    found = []
    for count in (2, 5):
        sessions = [lab.hydrate(engine, plan).session for _ in range(count)]
        asked = lab.ask(sessions, greedy(1, logprobs=TOP))
        found += [_far(alone, _row(out)) for out in engine.generate(asked).result()]
    return max(found)


def _far(right: dict[int, float], wrong: dict[int, float]) -> float:
    """The largest difference among what both name; where they name nothing in common, they are far apart."""
    both = right.keys() & wrong.keys()
    return max((abs(right[token] - wrong[token]) for token in both), default=math.inf)
