"""What every chapter of the law book stands on: fixtures, and short words for what tests do with an engine.

    engine, other   two engines alike, loaded once a class (so they stand for two processes, or two machines)
    load            loads one more, with changes: load(policy="7"). Boots may be slow: a whole `EngineTests` run boots
                    `engine`, `other` and four more
    mount           an empty folder of packs
    lab             the words below, bound to `mount`

Bit equality is asked of log probabilities as well as of tokens: a small error moves the first long before the second.
It is asked at equal batch shape: both sides run alone, or in groups of one size. What an engine lacks by
`info.capabilities` is asked for in the form that is left, never skipped.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from thaw.core.sampling import Sampling
from thaw.data.locations import BlobLocation, StoreMount
from thaw.data.pack import read_blob
from thaw.data.tiers.folder import folder_of
from thaw.data.tiers.mounted import Mounted
from thaw.engines.base import (
    Captured,
    Completion,
    Engine,
    GenerateRequest,
    Handle,
    Hydrated,
    HydratePlan,
    SessionRef,
)
from thaw.testing.plans import capture_plan, mount_at, plan_from

Load = Callable[..., Engine]
SEED = 20
LIMIT_S = 120.0
"""How long a test waits for anything; only a hang reaches it."""


def ids(count: int, start: int = 0) -> tuple[int, ...]:
    """The first `count` token ids (below 250) of sequence `start`; two sequences have nothing in common."""
    dice = random.Random(start)
    return tuple(dice.randrange(250) for _ in range(count))


def greedy(max_tokens: int = 16, **more: object) -> Sampling:
    return Sampling(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **more})  # type: ignore[arg-type]


def seeded(max_tokens: int = 16, **more: object) -> Sampling:
    return Sampling(**{"temperature": 1.0, "max_tokens": max_tokens, "ignore_eos": True, **more})  # type: ignore[arg-type]


LONGER_AND_LONGER = (48, 200, 1000, 1500, 1500, 1500)
"""Tokens of an answer that something must happen in the middle of. An engine may be done before the test's thread gets
its turn; then the test tries once more with a longer one, and fails where each was over too soon."""
LONGER_ANSWERS = tuple(seeded(count) for count in LONGER_AND_LONGER)


def every_knob(max_tokens: int = 20) -> Sampling:
    """All parameters on that change the choice, with a stop that min_tokens holds back."""
    return Sampling(
        temperature=0.9, top_p=0.97, top_k=60, min_p=0.001, repetition_penalty=1.2, presence_penalty=0.4,
        frequency_penalty=0.3, min_tokens=10, stop_token_ids=tuple(range(0, 250, 5)), max_tokens=max_tokens,
        logprobs=3,
    )  # fmt: skip


def bits(values: Sequence[float]) -> list[str]:
    return [value.hex() for value in values]


def can(engine: Engine, capability: str) -> bool:
    return capability in engine.info.capabilities


def run_again(engine: Engine) -> int:
    """Tokens that a session at a prompt's end runs again before it can go on: its last, where "boundary-hidden" lacks.

    Its parent does so too, and every other child: nobody there has more than the others."""
    return 0 if can(engine, "boundary-hidden") else 1


def kv_complete(engine: Engine, num_kv: int, num_tokens: int) -> bool:
    """All that was read has KV. A token that will run again, and write its KV anew, need not be counted."""
    return num_tokens - run_again(engine) <= num_kv <= num_tokens


def when(handle: Handle[Any], num_tokens: int, act: Callable[[], object]) -> None:
    """Follow `handle` to its end; `act` once, as soon as the batch has brought `num_tokens`."""
    seen, acted = 0, False
    for delta in handle:
        seen += len(delta.token_ids)
        if seen >= num_tokens and not acted:
            acted = True
            act()


def until(holds: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    """Return once `holds`; fail when it never does."""
    ends = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < ends, "it never came to that"
        time.sleep(0.005)


def wait_for(handle: Handle[Any], num_tokens: int) -> None:
    """Return once the batch has brought `num_tokens`; it goes on."""
    seen = 0
    for delta in handle:
        seen += len(delta.token_ids)
        if seen >= num_tokens:
            return


@contextlib.contextmanager
def running_policy(engine: Engine, version: str) -> Iterator[str]:
    """`engine.policy`, giving the name of the version before."""
    before = engine.policy_version
    with engine.policy(version=version):
        yield before


def same(one: Completion, two: Completion) -> None:
    """Tokens and log probabilities equal bit for bit, and with them text and the reason of the end."""
    assert one.token_ids == two.token_ids
    assert bits(one.logprobs) == bits(two.logprobs)
    assert one.top_logprobs == two.top_logprobs
    assert bits(one.entropies or ()) == bits(two.entropies or ())
    assert (one.text, one.finish_reason, one.stop_reason) == (two.text, two.finish_reason, two.stop_reason)
    assert len(one.token_ids) == len(one.logprobs) > 0


class Lab:
    """Short words for what tests do. Every call waits for its result, and none waits for ever."""

    def __init__(self, mount: StoreMount) -> None:
        self.mount = mount

    @property
    def packs(self) -> Path:
        """The folder of `mount`'s packs, for tests that look at its files."""
        return folder_of(self.mount.tiers[0])

    def read(self, location: BlobLocation) -> bytes:
        """A stored blob's verified bytes."""
        return read_blob(Mounted(self.mount), location)

    def begin(self, engine: Engine, count: int = 300, *, start: int = 0, seed: int = SEED) -> SessionRef:
        """A session that has read `count` tokens."""
        session = engine.open(seed=seed)
        engine.append(session, ids(count, start)).result(LIMIT_S)
        return session

    def ask(
        self, sessions: Sequence[SessionRef], sampling: Sampling, prompt: Sequence[int] = ()
    ) -> list[GenerateRequest]:
        return [GenerateRequest(session=s, prompt=tuple(prompt), sampling=sampling) for s in sessions]

    def start(
        self, engine: Engine, *sessions: SessionRef, sampling: Sampling, prompt: Sequence[int] = ()
    ) -> Handle[list[Completion]]:
        return engine.generate(self.ask(sessions, sampling, prompt))

    def run(
        self, engine: Engine, *sessions: SessionRef, sampling: Sampling, prompt: Sequence[int] = ()
    ) -> list[Completion]:
        """One batch over the sessions."""
        return self.start(engine, *sessions, sampling=sampling, prompt=prompt).result(LIMIT_S)

    def one(self, engine: Engine, session: SessionRef, sampling: Sampling, prompt: Sequence[int] = ()) -> Completion:
        return self.run(engine, session, sampling=sampling, prompt=prompt)[0]

    def resume(self, engine: Engine, *sessions: SessionRef) -> list[Completion]:
        return engine.generate([GenerateRequest(session=s, resume=True) for s in sessions]).result(LIMIT_S)

    def capture(self, engine: Engine, session: SessionRef, base: int = 0) -> Captured:
        return engine.capture(session, capture_plan(self.mount, base, engine.info.num_packs)).result(LIMIT_S)

    def captured_amid(
        self,
        engine: Engine,
        session: SessionRef,
        *,
        after: int = 10,
        samplings: Sequence[Sampling] = LONGER_ANSWERS,
        base: int = 0,
    ) -> tuple[Captured, Completion]:
        """A twin of `session`, captured while it decodes with `after` tokens or more of its answer; and that answer,
        whole. Where the engine was done first, once more with the next of `samplings`."""
        begun = len(engine.view(session).tokens)
        for sampling in samplings:
            twin = self.twin(engine, session)
            running = self.start(engine, twin, sampling=sampling)
            wait_for(running, after)
            captured = self.capture(engine, twin, base)
            whole = running.result(LIMIT_S)[0]
            engine.close_session(twin)
            if len(captured.tokens) - begun < len(whole.token_ids):
                assert len(captured.tokens) - begun >= after and captured.turns[-1].finish_reason is None
                return captured, whole
        raise AssertionError(f"{len(samplings)} answers were whole before the session was captured")

    def stopped_amid(
        self,
        engine: Engine,
        session: SessionRef,
        *,
        after: int = 5,
        samplings: Sequence[Sampling] = LONGER_ANSWERS,
        stop: Callable[[], object] | None = None,
    ) -> tuple[SessionRef, Completion, Completion]:
        """A twin of `session`, stopped (cancelled, unless `stop` does it) with `after` tokens or more of its answer;
        that part; and the answer uninterrupted. Where the engine was done first, once more with the next of
        `samplings`."""
        for sampling in samplings:
            one, twin = self.twin(engine, session), self.twin(engine, session)
            whole = self.one(engine, one, sampling)
            engine.close_session(one)
            running = self.start(engine, twin, sampling=sampling)
            wait_for(running, after)
            (stop or running.cancel)()
            part = running.result(LIMIT_S)[0]
            if part.finish_reason == "abort":
                assert after <= len(part.token_ids) < len(whole.token_ids)
                return twin, part, whole
            engine.close_session(twin)
        raise AssertionError(f"{len(samplings)} answers were whole before the session was stopped")

    def hydrate(self, engine: Engine, plan: HydratePlan) -> Hydrated:
        return engine.hydrate(plan).result(LIMIT_S)

    def plan(self, captured: Captured, *earlier: Captured, at: int | None = None) -> HydratePlan:
        return plan_from(captured, self.mount, *earlier, at=at)

    def move(self, engine: Engine, session: SessionRef, to: Engine) -> SessionRef:
        """The session as it is now, through bytes on disk, in engine `to`."""
        return self.hydrate(to, self.plan(self.capture(engine, session))).session

    def fork(self, engine: Engine, session: SessionRef, n: int = 1, **options: object) -> list[SessionRef]:
        return engine.fork(session, n, **options).result(LIMIT_S)  # type: ignore[arg-type]

    def twin(self, engine: Engine, session: SessionRef, at: int | None = None) -> SessionRef:
        """A child that goes on as the parent would: same seed."""
        return self.fork(engine, session, at=at, replay=True)[0]


class EngineKit:
    """The fixtures. `engine_factory` is the only one a subclass must give. A slow engine may lower the sizes."""

    changes_weights: ClassVar[bool] = False
    """Set by those that implement `change_weights`."""
    long_prompt: ClassVar[int] = 3500
    """Tokens of a prefill that something must happen in the middle of: several chunks of the engine's."""
    long_answer: ClassVar[int] = 3000
    """Tokens of a generation that is stopped: the engine must not be done with them in the time of a few calls."""
    max_batch: ClassVar[int] = 32
    """Sessions of the largest batch; at most so many as the engine runs in one step."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls) -> Load:
        raise NotImplementedError("give a class-scoped fixture `engine_factory`: (**changes) -> Engine")

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, engine_factory: Load) -> Iterator[Engine]:
        with engine_factory() as loaded:
            yield loaded

    @pytest.fixture(scope="class")
    @classmethod
    def other(cls, engine_factory: Load) -> Iterator[Engine]:
        with engine_factory() as loaded:
            yield loaded

    @pytest.fixture
    def load(self, engine_factory: Load) -> Iterator[Load]:
        """Engines of a test's own, closed when it ends."""
        loaded: list[Engine] = []

        def make(**changes: object) -> Engine:
            loaded.append(engine_factory(**changes))
            return loaded[-1]

        yield make
        for one in loaded:
            one.close()

    @pytest.fixture
    def mount(self, tmp_path: Path) -> StoreMount:
        return mount_at(tmp_path / "packs")

    @pytest.fixture
    def lab(self, mount: StoreMount) -> Lab:
        return Lab(mount)

    def change_weights(self, engine: Engine) -> None:
        """Change the running model's weights in place, telling nobody, so that its outputs change."""
        raise NotImplementedError

    def own_weights(self, engine: Engine) -> str:
        """What `engine.update_weights` takes for the weights that it was booted with."""
        return engine.info.model

    def guard_off(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        """Switch off what notices changed weights: to show what would happen without it."""
        raise NotImplementedError


def replaced(plan: HydratePlan, **changes: object) -> HydratePlan:
    """`plan`, taken by an engine whose identity differs in `changes`."""
    return msgspec.structs.replace(plan, identity=msgspec.structs.replace(plan.identity, **changes))
