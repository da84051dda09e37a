"""KV that other weights computed, kept in a live session because its owner asked for it (`keep_stale_kv`).

A session's KV is of the weights that run, until they change. Then, at its next use, what there is becomes a span of its
own. Nothing is copied, and a session that was forked off has to be asked about by itself before it may go on with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from thaw.core import kv_ranges
from thaw.core.errors import StaleSession, TooLong
from thaw.core.kv_ranges import KVRange
from thaw.engines.embedded.weights import Weights, WeightsWatch

STORED = -1
"""The epoch of KV that another engine, or an earlier life of this one, computed."""


@dataclass(frozen=True)
class PolicySpan:
    """KV from the end of the span before it up to token `end`. `weights`: their id, where the epoch does not say it."""

    end: int
    of: Weights
    weights: str | None = None


@dataclass
class StaleKV:
    """Of one session. Behind `spans` comes the KV of what the session is of now, which every method is given (`now`).

    `asked`: its owner wants it kept. `settled`: so many tokens are known to be each of one policy: the weights were
    looked at after them.
    """

    watch: WeightsWatch
    asked: bool = False
    settled: int = 0
    spans: list[PolicySpan] = field(default_factory=list)

    def step(self, old: Weights, new: Weights, num_kv: int) -> None:
        """From `old` to `new`. Raises `StaleSession` where they changed while a part of the KV was computed: no name
        for it would be right."""
        if num_kv > self.settled:
            raise StaleSession(
                f"the weights or the policy changed while tokens {self.settled} to {num_kv - 1} of the session were "
                f"computed, so their KV is of no one policy and cannot be kept. {StaleSession.way_out}"
            )
        if len(self.spans) >= kv_ranges.MAX_RANGES - 1:
            raise TooLong(f"the session's KV is of {len(self.spans)} policies; append its tokens to a new session")
        if num_kv > self._end:
            self.spans.append(PolicySpan(num_kv, old))
        self._join(new)

    def cut(self, now: Weights, num_kv: int) -> None:
        """Only the first `num_kv` tokens are left."""
        self.settled = min(self.settled, num_kv)
        starts = [0, *(span.end for span in self.spans)]
        self.spans = [
            replace(span, end=min(span.end, num_kv))
            for start, span in zip(starts, self.spans, strict=False)
            if start < num_kv
        ]
        self._join(now)

    def child(self, now: Weights, num_kv: int) -> StaleKV:
        """Of a fork's child that begins with the first `num_kv` tokens: nobody has asked for it yet."""
        child = StaleKV(self.watch, settled=num_kv, spans=list(self.spans))
        child.cut(now, num_kv)
        return child

    def load(self, now: Weights, ranges: Iterable[KVRange]) -> None:
        """What a stored state said."""
        self.spans = [PolicySpan(one.end, Weights(one.policy, STORED), one.weights) for one in ranges]
        self.settled = self._end
        self._join(now)

    def ranges(self, now: Weights, num_kv: int) -> tuple[KVRange, ...]:
        """Which weights computed the session's KV; () where all is of those that run, or nobody asked to keep it."""
        if not (self.spans or self.asked):
            return ()
        running = self.watch.running
        if not self.spans and now == running:
            return ()
        return self._stale(now, num_kv, running)

    def ranges_of_cut(self, now: Weights, num_kv: int) -> tuple[KVRange, ...]:
        """As `ranges`, where those of `now` run."""
        return self._stale(now, num_kv, now) if self.spans else ()

    def _stale(self, now: Weights, num_kv: int, running: Weights) -> tuple[KVRange, ...]:
        spans, start, out = (*self.spans, PolicySpan(num_kv, now)), 0, []
        for span in spans:
            out.append(KVRange(start=start, end=span.end, policy=span.of.policy, weights=self._id_of(span)))
            start = span.end
        own = [self._is_of(span, running) for one, span in zip(out, spans, strict=True) if one.end > one.start]
        return () if all(own) else kv_ranges.joined(out)

    def _id_of(self, span: PolicySpan) -> str | None:
        """Of its weights; None where nobody asked for it while they ran."""
        return self.watch.weights_of(span.of.epoch) if span.weights is None else span.weights

    @property
    def _end(self) -> int:
        return self.spans[-1].end if self.spans else 0

    def _join(self, now: Weights) -> None:
        """The last spans are none where those of `now` computed them."""
        while self.spans and self._is_of(self.spans[-1], now):
            self.spans.pop()

    def _is_of(self, span: PolicySpan, now: Weights) -> bool:
        weights = self._id_of(span)
        known = weights is not None and weights == self.watch.weights_of(now.epoch)
        return span.of == now or (known and span.of.policy == now.policy)
