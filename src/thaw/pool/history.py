"""A branch's tokens and turns, known to the client: what trajectories are made of, and what is left when a worker dies.

Only tokens, never KV. The point's part is shared by all branches of a round.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import msgspec

from thaw.core.canonical import U64
from thaw.core.objects import Turn
from thaw.core.sampling import Sampling


@dataclass(frozen=True)
class History:
    """The point (`before`), what the branch appended, and its completion, sampled under `policy`.

    `resumed`: the completion is the point's interrupted one and holds all of it. `seed` is the session's; `turn_seed`
    is the one that the completion was sampled with (`Sampling` may have its own)."""

    before: tuple[int, ...]
    before_turns: tuple[Turn, ...]
    prompt: tuple[int, ...]
    prompt_text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...] | None
    text: str
    finish_reason: Literal["stop", "length", "abort"] | None
    sampling: Sampling
    seed: int
    turn_seed: int
    policy: str
    resumed: bool = False

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        return (*self.before[: self._start], *self.prompt, *self.token_ids)

    @cached_property
    def turns(self) -> tuple[Turn, ...]:
        """Tiling all tokens."""
        turns, end = self.before_turns, self._start
        if self.resumed:
            turns = turns[:-1]
        if self.prompt:
            turns = (*turns, self._turn("prompt", end, end + len(self.prompt)))
            end += len(self.prompt)
        return (*turns, self._turn("completion", end, end + len(self.token_ids)))

    @property
    def _start(self) -> int:
        return self.before_turns[-1].start if self.resumed else len(self.before)

    def _turn(self, kind: Literal["prompt", "completion"], start: int, end: int) -> Turn:
        if kind == "prompt":
            return Turn(kind=kind, start=start, end=end, text=self.prompt_text, policy=self.policy)
        return Turn(
            kind=kind, start=start, end=end, text=self.text, sampling=self.sampling, seed=U64(self.turn_seed),
            finish_reason=self.finish_reason, logprobs=self.logprobs, policy=self.policy,
            entropies=self.entropies or msgspec.UNSET,
        )  # fmt: skip
