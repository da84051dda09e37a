"""Requests that are interrupted: preempted for want of blocks, stopped while they load or wait, read meanwhile.

Afterwards nothing is left over, and every session goes on with the bits it would have had: as a request alone, for on a
CPU the bits of one request depend on what runs beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_operators import Owner, Plain

from thaw.core.errors import Cancelled, CorruptBlob, InvalidRequest, NotHit, StorageFailed
from thaw.core.sampling import Sampling
from thaw.data.locations import StoreMount
from thaw.engines import load_engine
from thaw.engines.base import Completion, GenerateRequest, Handle, HydratePlan, SessionRef
from thaw.testing.laws.kit import LIMIT_S, Lab, bits, greedy, ids, same, seeded, wait_for
from thaw.testing.plans import capture_plan, flip_byte, mount_at

pytest.importorskip("vllm")

from thaw.engines.served import protocol
from thaw.engines.served.client import hydrating
from thaw.engines.vllm.client.engine import VllmEngine

BLOCKS = 24
TOKEN_NBYTES = 3 * 2 * 2 * 64 * 2
IN_STEP, IN_BACKGROUND = 500, 1000
"""Sizes of sessions: one is loaded inside a step, the other beside the steps of others."""


@pytest.fixture(scope="module")
def no_collector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes begun meanwhile run without Python's collector: in an idle engine it may not come by for long, and
    nothing must wait for it."""
    folder = tmp_path_factory.mktemp("no-collector")
    (folder / "sitecustomize.py").write_text("import gc\ngc.disable()\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path], no_collector: None) -> Iterator[VllmEngine]:
    model = str(tiny_model("llama", dtype="bfloat16", head_dim=64))
    with load_engine(
        "vllm", model=model, enforce_eager=True, max_model_len=2560, num_gpu_blocks_override=BLOCKS, block_size=128,
        async_nbytes=700 * TOKEN_NBYTES,
    ) as loaded:  # fmt: skip
        assert isinstance(loaded, VllmEngine)
        yield loaded


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> StoreMount:
    return mount_at(tmp_path_factory.mktemp("packs"))


@pytest.fixture(scope="module")
def lab(mount: StoreMount) -> Lab:
    return Lab(mount)


@pytest.fixture(autouse=True)
def nothing_is_left(engine: VllmEngine) -> Iterator[None]:
    """No record, request, block or letter, whatever a test did."""
    yield
    for session in list(engine._sessions):
        engine.close_session(session)
    gc.collect()  # here, in the client: an error that was raised holds what it passed, until the collector comes by
    ends = time.monotonic() + 10.0
    while left := leftovers(engine):
        assert time.monotonic() < ends, left
        time.sleep(0.05)


def leftovers(engine: VllmEngine) -> dict[str, object]:
    stats = engine.stats()
    engine.release_pins()  # one more message: what was dropped is told with the next one
    found: dict[str, object] = {name: stats[name] for name in ("records", "running", "commands", "pinned_blocks")}
    found["blocks"] = stats["blocks"] - 1 - stats["free_blocks"]
    mail = engine._transport.mail.folder
    found["mail"] = [path.name for place in ("answers", "plans", "entropies") for path in (mail / place).iterdir()]
    found["arena_nbytes"] = stats["arena_nbytes"]
    return {name: value for name, value in found.items() if value}


def cycle(engine: VllmEngine, lab: Lab) -> None:
    """Other prompts through the whole pool, so that nothing is found there."""
    for start in (100, 101):
        engine.close_session(lab.begin(engine, 2000, start=start))


class Hog:
    """An ordinary request that takes most of the blocks. It came before thaw's, so vLLM preempts those."""

    def __init__(self, engine: VllmEngine, num_prompt: int = 1500, count: int = 400) -> None:
        from vllm import SamplingParams

        llm: Any = engine._transport._llm  # type: ignore[attr-defined]
        sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        self._began = threading.Event()
        self.told: list[float] = []
        """When each token came, by `time.monotonic`."""

        async def run() -> None:
            async for _ in llm.generate({"prompt_token_ids": list(ids(num_prompt, 50))}, sampling, f"hog-{id(self)}"):
                self.told.append(time.monotonic())
                self._began.set()

        self._run = asyncio.run_coroutine_threadsafe(run(), engine._loop.inner)
        assert self._began.wait(LIMIT_S)

    def end(self) -> None:
        self._run.result(LIMIT_S)

    def stop(self) -> None:
        """Once it has got one more token: it ran until now."""
        told = len(self.told)
        while len(self.told) == told:
            assert not self._run.done(), "it was to run all the time"
            time.sleep(0.001)
        self._run.cancel()


def same_rest(one: Completion, two: Completion) -> None:
    assert one.token_ids == two.token_ids
    assert bits(one.logprobs) == bits(two.logprobs)


def when_preempted(engine: VllmEngine, before: int, running: Handle[list[Completion]]) -> None:
    ends = time.monotonic() + LIMIT_S
    while engine.stats()["preempted"] == before:
        assert time.monotonic() < ends and not running.done(), "it was to be preempted"


@pytest.mark.parametrize("size", [2048, 2150])
def test_preempted_for_want_of_blocks_it_goes_on_bit_for_bit(
    engine: VllmEngine, lab: Lab, mount: StoreMount, size: int
) -> None:
    """Alone, it outgrows what pins have left. vLLM takes its blocks away; it is captured while it has none, and goes on
    when there is room again: its KV comes from the arena, and nothing is computed a second time."""
    session = lab.begin(engine, size, start=1)
    expected = lab.one(engine, lab.twin(engine, session), seeded(200))
    holder = lab.begin(engine, 768, start=90)
    assert engine.pin(holder, 60).result(LIMIT_S) == 768
    before = engine.stats()["preempted"]
    victim = lab.twin(engine, session)
    running = lab.start(engine, victim, sampling=seeded(200))
    when_preempted(engine, before, running)
    captured = lab.capture(engine, victim)
    done = len(captured.tokens) - size
    assert size + done == 2177 and captured.num_kv == 2176, "all that 17 blocks hold"
    assert not running.done()
    engine.release_pins()
    same(expected, running.result(LIMIT_S)[0])
    same_rest(lab.resume(engine, lab.hydrate(engine, lab.plan(captured)).session)[0], expected)
    same(lab.one(engine, lab.twin(engine, victim), greedy(4)), lab.one(engine, victim, greedy(4)))


@pytest.mark.parametrize("size", [IN_STEP, IN_BACKGROUND])
def test_hydrated_and_captured_while_requests_are_preempted(engine: VllmEngine, lab: Lab, size: int) -> None:
    """In a pool for two, a hog, sessions that grow and sessions that come back: all end, and KV is what it was."""
    session = lab.begin(engine, size, start=2)
    plan = lab.plan(lab.capture(engine, session))
    expected = lab.one(engine, lab.twin(engine, session), seeded(20))
    before = engine.stats()["preempted"]
    hog = Hog(engine)
    growing = [lab.begin(engine, 500, start=3 + i) for i in range(2)]
    handles = [lab.start(engine, one, sampling=seeded(200)) for one in growing]
    back = [lab.hydrate(engine, plan)]
    captured = lab.capture(engine, growing[0])
    while not all(handle.done() for handle in handles):
        back.append(lab.hydrate(engine, plan))
        captured = lab.capture(engine, growing[0])
        assert captured.num_kv == len(captured.tokens) - 1
    assert all(len(handle.result(LIMIT_S)[0].token_ids) == 200 for handle in handles)
    hog.end()
    assert engine.stats()["preempted"] > before, "the pool was too large for this test"
    for hydrated in (back[0], back[-1]):
        assert hydrated.proof.num_cached_tokens == plan.num_kv
        same(expected, lab.one(engine, lab.twin(engine, hydrated.session), seeded(20)))
    again = lab.hydrate(engine, lab.plan(captured)).session
    assert engine.view(again).tokens == captured.tokens == engine.view(growing[0]).tokens[: len(captured.tokens)]


@pytest.mark.parametrize("size", [IN_STEP, IN_BACKGROUND])
def test_stopped_at_any_moment_it_goes_on_bit_for_bit(engine: VllmEngine, lab: Lab, size: int) -> None:
    """While it waits, loads, runs its first token, or is saved: a stop costs the request alone."""
    dice = random.Random(size)
    session = lab.begin(engine, size, start=4)
    expected = lab.one(engine, lab.twin(engine, session), seeded(12))
    kept = 0
    for tried in itertools.count(1):
        if dice.random() < 0.5:
            cycle(engine, lab)
        child = lab.twin(engine, session)
        handle = lab.start(engine, child, sampling=seeded(12))
        time.sleep(dice.random() * 0.04)
        handle.cancel()
        cut = handle.result(LIMIT_S)[0]
        assert cut.token_ids == expected.token_ids[: len(cut.token_ids)]
        if cut.finish_reason == "abort":
            kept += 1
            rest = lab.resume(engine, child)[0]
            same_rest(rest, expected)
        engine.close_session(child)
        if tried >= 15 and kept > 3:
            break
        assert tried < 60, f"stopped {kept} times only"
    same(expected, lab.one(engine, session, seeded(12)))


def test_stopped_when_the_engine_is_done_already(engine: VllmEngine, lab: Lab) -> None:
    """The client has some of the answer, and leaves it; the engine, which never hears of that, made all of it."""
    session = lab.begin(engine, 300, start=16)
    expected = lab.one(engine, lab.twin(engine, session), seeded(40))
    inner, child, names = engine._transport.abort, lab.twin(engine, session), []

    async def running() -> int:
        return (await engine._talk.command(protocol.GetStats(id=secrets.token_hex(16)))).counts["running"]

    async def abort(name: str) -> None:
        names.append(name)
        while name == names[0] and await running():
            await asyncio.sleep(0.01)
        await inner(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._transport, "abort", abort)
        handle = lab.start(engine, child, sampling=seeded(40))
        wait_for(handle, 3)
        handle.cancel()
        cut = handle.result(20.0)[0]
    assert cut.finish_reason == "abort" and cut.token_ids == expected.token_ids[: len(cut.token_ids)]
    same_rest(lab.resume(engine, child)[0], expected)


def test_a_prompt_that_is_stopped_keeps_what_was_read(engine: VllmEngine, lab: Lab) -> None:
    """Stopped before its first step it has read nothing, in its last step all; either way the session goes on."""
    prompt = ids(2000, 5)
    expected = lab.one(engine, lab.begin(engine, len(prompt), start=5, seed=20), seeded(8))
    reads = set()
    for i in range(6):
        cycle(engine, lab)
        session = engine.open(seed=20)
        handle = engine.append(session, prompt)
        while not engine.view(session).running:
            time.sleep(0.0005)
        time.sleep(0.005 * i)
        handle.cancel()
        try:
            handle.result(LIMIT_S)
        except Cancelled:
            reads.add(len(engine.view(session).tokens))
        read = len(engine.view(session).tokens)
        assert engine.view(session).tokens == tuple(prompt[:read])
        cycle(engine, lab)  # vLLM would find what was read of it in its cache, and compute the rest in another shape
        engine.append(session, prompt[read:]).result(LIMIT_S)
        if read in (0, len(prompt)):
            same(expected, lab.one(engine, session, seeded(8)))
        engine.close_session(session)
    assert reads, "every prompt was read before it could be stopped"


def test_the_leader_of_a_load_is_stopped_and_the_others_load_themselves(engine: VllmEngine, lab: Lab) -> None:
    """Children that start together: the first loads, the others wait for it. They must not wait for ever."""
    session = lab.begin(engine, IN_BACKGROUND, start=6)
    expected = lab.one(engine, lab.twin(engine, session), seeded(6))
    for pause_s in (0.0, 0.001, 0.002, 0.004, 0.008, 0.016):
        cycle(engine, lab)
        children = [lab.twin(engine, session) for _ in range(4)]
        handles = [lab.start(engine, child, sampling=seeded(6)) for child in children]
        time.sleep(pause_s)
        handles[0].cancel()
        outs = [handle.result(LIMIT_S)[0] for handle in handles]
        assert all(len(out.token_ids) == 6 for out in outs[1:])
        for child in children:
            engine.close_session(child)
    same(expected, lab.one(engine, session, seeded(6)))


class Missing:
    """The way into the engine, on which the second request of a batch is refused: its group never is complete."""

    def __init__(self, engine: VllmEngine, patch: pytest.MonkeyPatch) -> None:
        inner = engine._transport.stream
        self.count = 0

        def stream(submission: Any) -> Any:
            self.count += 1
            if self.count == 2:
                raise InvalidRequest("refused on the way")
            return inner(submission)

        patch.setattr(engine._transport, "stream", stream)


def batch(engine: VllmEngine, sessions: list[SessionRef], sampling: Sampling) -> Handle[list[Completion]]:
    return engine.generate([GenerateRequest(session=session, sampling=sampling) for session in sessions])


def test_a_group_that_never_is_complete_starts_all_the_same(
    engine: VllmEngine, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = lab.begin(engine, 300, start=7)
    children = [lab.twin(engine, session) for _ in range(3)]
    expected = lab.run(engine, *(lab.twin(engine, session) for _ in range(2)), sampling=seeded(6))
    with monkeypatch.context() as patch:
        Missing(engine, patch)
        with pytest.raises(InvalidRequest, match="on the way"):
            batch(engine, children, seeded(6)).result(LIMIT_S)
    for child, wanted in zip((children[0], children[2]), expected, strict=True):
        assert engine.view(child).tokens[300:] == wanted.token_ids


def test_stopped_while_it_waits_for_its_group(engine: VllmEngine, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    session = lab.begin(engine, 300, start=8)
    expected = lab.one(engine, lab.twin(engine, session), seeded(6))
    children = [lab.twin(engine, session) for _ in range(3)]
    with monkeypatch.context() as patch:
        Missing(engine, patch)
        handle = batch(engine, children, seeded(6))
        time.sleep(0.2)
        assert engine.stats()["running"] == 2
        began = time.monotonic()
        handle.cancel()
        with pytest.raises(InvalidRequest, match="on the way"):
            handle.result(LIMIT_S)
        assert time.monotonic() - began < 4.0, "they did not wait for the group's time to be over"
    for child in children:
        same(expected, lab.one(engine, child, seeded(6)))


def test_read_forked_and_closed_while_the_copy_of_its_end_is_under_way(
    engine: VllmEngine, lab: Lab, mount: StoreMount
) -> None:
    session = lab.begin(engine, IN_STEP, start=9)
    twin = lab.twin(engine, session)
    first = lab.one(engine, session, seeded(5))
    expected = lab.one(engine, session, greedy(5), (3,))
    for _ in range(5):
        child = lab.twin(engine, twin)
        same(first, lab.one(engine, child, seeded(5)))
        reading = engine.capture(child, capture_plan(mount))
        grandchild = lab.twin(engine, child)
        going_on = lab.start(engine, grandchild, sampling=greedy(5), prompt=(3,))
        engine.close_session(child)
        captured = reading.result(LIMIT_S)
        same(expected, going_on.result(LIMIT_S)[0])
        same(expected, lab.one(engine, lab.hydrate(engine, lab.plan(captured)).session, greedy(5), (3,)))


def test_aborted_while_it_is_captured_both_the_snapshot_and_the_session_go_on(
    engine: VllmEngine, lab: Lab, mount: StoreMount
) -> None:
    """The abort comes before, while and after the copy is taken: whichever it was, what was captured is a prefix of the
    uninterrupted turn, with its bits."""
    session = lab.begin(engine, IN_STEP, start=10)
    expected = lab.one(engine, lab.twin(engine, session), seeded(250))
    lengths = set()
    for delay in (0.0, 0.003, 0.01, 0.04):
        child = lab.twin(engine, session)
        running = lab.start(engine, child, sampling=seeded(250))
        wait_for(running, 3)
        reading = engine.capture(child, capture_plan(mount))
        time.sleep(delay)
        running.cancel()
        captured = reading.result(LIMIT_S)
        with contextlib.suppress(Cancelled):
            running.result(LIMIT_S)
        lengths.add(len(captured.tokens))
        done = captured.tokens[IN_STEP:]
        assert 3 <= len(done) < 250 and done == expected.token_ids[: len(done)]
        for one in (lab.hydrate(engine, lab.plan(captured)).session, child):
            same_rest(lab.resume(engine, one)[0], expected)
            engine.close_session(one)
    print("tokens captured:", sorted(lengths))
    assert engine.stats()["running"] == 0


def test_others_go_on_while_a_session_is_captured_and_another_one_is_loaded(engine: VllmEngine, lab: Lab) -> None:
    """A plain request gets tokens between the begin and the end of a capture and of a load in the background."""
    session = lab.begin(engine, IN_BACKGROUND, start=11)
    expected = lab.one(engine, lab.twin(engine, session), greedy(1))
    cycle(engine, lab)
    plain = Hog(engine, num_prompt=100, count=2400)
    windows = []
    for _ in range(4):
        began = time.monotonic()
        captured = lab.capture(engine, session)
        middle = time.monotonic()
        hydrated = lab.hydrate(engine, lab.plan(captured)).session
        assert lab.one(engine, hydrated, greedy(1)).token_ids == expected.token_ids
        windows += [("capture", began, middle), ("load", middle, time.monotonic())]
        engine.close_session(hydrated)
    plain.stop()
    gaps = [(b - a, a) for a, b in itertools.pairwise(plain.told)]
    for what in ("capture", "load"):
        mine = [(a, b) for name, a, b in windows if name == what]
        assert all(any(a < at < b for at in plain.told) for a, b in mine), what
        inside = max(gap for gap, at in gaps if any(a <= at + gap and at <= b for a, b in mine))
        print(f"largest gap at a {what}: {inside * 1e3:.1f} ms; median {sorted(gaps)[len(gaps) // 2][0] * 1e3:.1f} ms")


# -- loads that fail


def unread(engine: VllmEngine, lab: Lab, plan: HydratePlan) -> SessionRef:
    """A session whose pack is damaged, of a client that does not hear so and goes on: the engine has no KV of it."""
    flip_byte(lab.packs, plan.slices[0].blobs[plan.identity.groups[0].name][0])
    with pytest.raises(CorruptBlob):
        lab.hydrate(engine, plan)
    command = engine._talk.command

    async def unheard(message: protocol.Message, *senders: Any) -> protocol.Answer:
        try:
            return await command(message, *senders)
        except CorruptBlob:
            return protocol.Answer()

    async def unproved(session: object, plan: HydratePlan, *_: object) -> int:
        return plan.num_kv

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._talk, "command", unheard)
        patch.setattr(hydrating, "_probe", unproved)
        return lab.hydrate(engine, plan).session


def in_one_step(engine: VllmEngine, lab: Lab, *sessions: SessionRef) -> tuple[Plain, list[Handle[list[Completion]]]]:
    """An ordinary request, a session and perhaps one more that wants a single token: they come while the engine is
    paused, one after another, and begin in the same step."""
    owner, handles = Owner(engine), []
    owner.pause("keep")
    with ThreadPoolExecutor(1) as pool:
        try:
            plain = pool.submit(owner.plain, ids(300, 60), 60)
            has_come(owner, 1)
            for session, sampling in zip(sessions, (seeded(60), greedy(1)), strict=False):
                handles.append(lab.start(engine, session, sampling=sampling))
                has_come(owner, 1 + len(handles))
        finally:
            owner.resume()
        return plain.result(LIMIT_S), handles


def has_come(owner: Owner, count: int) -> None:
    ends = time.monotonic() + LIMIT_S
    while owner._llm.output_processor.get_num_unfinished_requests() < count:
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.parametrize("size", [IN_STEP, IN_BACKGROUND])
def test_a_load_that_fails_ends_its_own_request_alone(engine: VllmEngine, lab: Lab, size: int) -> None:
    """An ordinary request and a session beside it are what they are beside one that loads and ends in that step, or,
    where it loads in the background and never is in a batch, what they are without it."""
    session = lab.begin(engine, 300, start=10)
    good = lab.begin(engine, size, start=11)
    bad = unread(engine, lab, lab.plan(lab.capture(engine, good)))
    third = [good] if size == IN_STEP else []
    expected, handles = in_one_step(engine, lab, lab.twin(engine, session), *third)
    plain, (beside, failed) = in_one_step(engine, lab, lab.twin(engine, session), bad)
    with pytest.raises(StorageFailed, match="could not be kept: the engine has let go"):
        failed.result(LIMIT_S)
    assert plain == expected and len(plain.token_ids) == 60
    same(handles[0].result(LIMIT_S)[0], beside.result(LIMIT_S)[0])
    assert all(len(handle.result(LIMIT_S)[0].token_ids) == 1 for handle in handles[1:])
    with pytest.raises(StorageFailed, match="could not be kept: the engine has let go"):
        lab.one(engine, bad, greedy(1))
    assert len(lab.one(engine, good, greedy(2)).token_ids) == 2


def test_a_restore_that_the_engine_counts_short_is_not_hit(
    engine: VllmEngine, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason: it is the engine's count that is the proof, and a session's turns depend on it too."""
    session = lab.begin(engine, 300, start=12)
    plan, run = lab.plan(lab.capture(engine, session)), engine._talk.run

    async def short(*arguments: Any) -> protocol.Answer:
        return msgspec.structs.replace(await run(*arguments), local=128, external=0)

    monkeypatch.setattr(engine._talk, "run", short)
    with pytest.raises(NotHit, match=f"128 of {plan.num_kv}"):
        lab.hydrate(engine, plan)
    with pytest.raises(NotHit, match="128 of 299"):
        lab.one(engine, session, greedy(1))
