"""One measurement: children of a session, from the start of the arm to their first tokens and to their last.

The clock is `time.monotonic`, which all processes of a machine share, so a fresh process is timed from the moment it
was asked for. The same code runs in every arm; only how the session came to be differs.
"""

from __future__ import annotations

import statistics
import struct
import time
from collections.abc import Sequence

import msgspec

from thaw.core.ids import digest
from thaw.core.sampling import Sampling
from thaw.engines.base import Completion
from thaw.receipt import Hits, Round
from thaw.repo import Group, Session, Stream


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """`n` children, child i with `suffixes[i]`, `max_tokens` each; seeds derived from the session's."""

    n: int
    suffixes: tuple[tuple[int, ...], ...]
    max_tokens: int
    temperature: float = 1.0


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What one measurement gave; see `thaw.receipt.Round`."""

    values: dict[str, float]
    stages_s: dict[str, float] = {}
    hits: Hits | None = None
    outputs: dict[str, str] = {}

    @classmethod
    def of_round(cls, taken: Round) -> Sample:
        return cls(values=taken.values, stages_s=taken.stages_s, hits=taken.hits, outputs=taken.outputs)

    def as_round(self, pair: int) -> Round:
        return Round(pair=pair, values=self.values, stages_s=self.stages_s, hits=self.hits, outputs=self.outputs)


def median_of(samples: Sequence[Sample]) -> Sample:
    """Of samples that did the same: every figure's median, the first one's hits, no outputs."""
    first = samples[0]
    return Sample(
        values={name: statistics.median(sample.values[name] for sample in samples) for name in first.values},
        stages_s={name: statistics.median(sample.stages_s[name] for sample in samples) for name in first.stages_s},
        hits=first.hits,
    )


class Clock:
    """Seconds since `started`, and the stages in between."""

    def __init__(self, started: float | None = None) -> None:
        self.started = time.monotonic() if started is None else started
        self._last = self.started
        self.stages_s: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """What was done since the last lap is `stage`."""
        now = time.monotonic()
        self.stages_s[stage] = self.stages_s.get(stage, 0.0) + now - self._last
        self._last = now

    def elapsed_s(self) -> float:
        return time.monotonic() - self.started


def children(parent: Session, ask: Ask, clock: Clock, *, num_wanted: int, num_prefilled: int = 0) -> Sample:
    """Fork, run all children in one batch, close them. `num_wanted`: tokens that each should find in the cache;
    `num_prefilled`: tokens that the arm ran through the model before."""
    with parent.fork(ask.n) as kids:
        clock.lap("fork")
        sampling = Sampling(temperature=ask.temperature, max_tokens=ask.max_tokens, ignore_eos=True)
        stream = kids.stream(token_ids=ask.suffixes[: ask.n], sampling=sampling)
        _wait_for_first(stream, kids)
        first = clock.elapsed_s()
        clock.lap("first_token")
        done = stream.result()
        clock.lap("rest")
    return Sample(
        values={"first_token_s": first, "total_s": clock.elapsed_s()},
        stages_s=dict(clock.stages_s),
        hits=hits(done, num_wanted, num_prefilled),
        outputs=outputs(done),
    )


def _wait_for_first(stream: Stream[list[Completion]], kids: Group) -> None:
    """Until every child has a token."""
    waiting = set(range(len(kids)))
    for delta in stream:
        if delta.token_ids:
            waiting.discard(delta.index)
        if not waiting:
            return


def hits(done: Sequence[Completion], num_wanted: int, num_prefilled: int) -> Hits:
    return Hits(
        num_prompt_tokens=sum(c.usage.num_prompt_tokens for c in done),
        num_wanted_tokens=num_wanted * len(done),
        num_cached_tokens=sum(c.usage.num_cached_tokens for c in done),
        num_prefilled_tokens=num_prefilled + sum(c.usage.num_prefilled_tokens for c in done),
    )


def outputs(done: Sequence[Completion]) -> dict[str, str]:
    """Digests of tokens and raw log probabilities (as float64, every bit of them), of the first step and of all."""
    return {
        "first_tokens": tokens_digest([c.token_ids[:1] for c in done]),
        "first_logprobs": _digest("d", [c.logprobs[:1] for c in done]),
        "tokens": tokens_digest([c.token_ids for c in done]),
        "logprobs": _digest("d", [c.logprobs for c in done]),
    }


def tokens_digest(rows: Sequence[Sequence[int]]) -> str:
    """Of the token ids of all children, in order."""
    return _digest("I", rows)


def _digest(code: str, rows: Sequence[Sequence[float]]) -> str:
    return digest(b"".join(struct.pack(f"<Q{len(row)}{code}", len(row), *row) for row in rows))
