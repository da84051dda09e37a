"""What `verify` returns: one result a law, and a continuation in numbers. Plain values, made for JSON."""

from __future__ import annotations

import msgspec

from thaw.core.kv_ranges import KVRange


class LawResult(msgspec.Struct, frozen=True, kw_only=True):
    """`held`: True, False, or None where nothing was promised or it could not be tried (`detail` says why)."""

    name: str
    held: bool | None
    promised: str
    seen: str
    detail: str = ""


class Continuation(msgspec.Struct, frozen=True, kw_only=True):
    """Greedy tokens after the point, hydrated against prefilled again in the same engine. Information, not a law.

    `first_difference`: index of the first token that differs, None when all agree. `max_logprob_difference`: over the
    tokens before it. Times are seconds to the first token, load or prefill included.
    """

    num_tokens: int
    first_difference: int | None
    max_logprob_difference: float
    hydrate_s: float
    prefill_s: float
    hydrated_text: str
    prefilled_text: str


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True):
    """`point` is spelled so that it means the same for ever. `kv_ranges`: which weights computed the point's KV, where
    that is not its model's alone; it was then taken as it is."""

    point: str
    num_tokens: int
    num_kv: int
    engine: str
    engine_version: str
    device: str
    laws: tuple[LawResult, ...]
    continuation: Continuation | None
    fresh_process: bool = False
    kv_ranges: tuple[KVRange, ...] = ()

    @property
    def ok(self) -> bool:
        """No law failed."""
        return all(law.held is not False for law in self.laws)
