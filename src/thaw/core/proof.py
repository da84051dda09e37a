"""The proof: what every restore returns, counted by the engine and not by us."""

from __future__ import annotations

from typing import Literal

import msgspec

from thaw.core.kv_ranges import KVRange

Continuation = Literal["decode-exact", "own-hit-exact", "close"]
Verification = Literal["disk-verified", "arena-sealed", "device-verified", "live-shared", "none"]


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """How a session came to have its KV.

    `num_cached_tokens`: tokens whose KV the engine found in its cache when the session first ran, by its own count;
    `num_prompt_tokens`: the tokens it was given; `matched`: how many of the wanted tokens that covers;
    `first_mismatch`: position of the first wanted token that was not restored, None when all were;
    `num_recomputed_tokens`: prefilled again because the caller allowed it (0 for a pure restore).
    `stages_s`: seconds by stage. `verification`: the level at which law 1 was checked.
    `continuation`: the class promised from here on. `share_prefix`: blocks may come from other lineages.
    `kv_ranges`: which weights computed the KV that it began with, or that it kept over the last policy step, where not
    all of it is of those that run (`stale_kv`). `continuation` then compares with a session that kept the same KV.
    """

    num_prompt_tokens: int
    num_cached_tokens: int
    matched: int
    first_mismatch: int | None
    num_recomputed_tokens: int = 0
    nbytes: int = 0
    verification: Verification
    continuation: Continuation
    share_prefix: bool = False
    reason: str = ""
    stages_s: dict[str, float] = {}
    kv_ranges: tuple[KVRange, ...] = ()

    @property
    def hit(self) -> bool:
        """Every token that was to be restored was counted as cached."""
        return (
            self.first_mismatch is None and self.num_cached_tokens >= self.matched and self.num_recomputed_tokens == 0
        )
