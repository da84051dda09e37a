"""What a client asks, in no dialect, and what came of it."""

from __future__ import annotations

from typing import Literal

import msgspec

from thaw.core.sampling import Sampling
from thaw.engines.base import Message, Policy
from thaw.gateway.speech import ForcedCalls, Said
from thaw.repo.resolve import ResolvedPoint


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One request. Either `messages`, or `token_ids` with their `text`.

    `at`: continue from there; without it the longest stored prefix is looked for. `instructions`: the system's message,
    which is not of the conversation at `at`: `held_instructions` that were there are left out (None: where there
    are new ones, and the conversation began with the system's message). `whole`: the
    messages are the conversation and not what follows `at`. `resume`: the answer at `at` was interrupted, and goes on;
    nothing else is looked at. `max_tokens` None: as many as there is room for.
    """

    messages: tuple[Message, ...] = ()
    token_ids: tuple[int, ...] | None = None
    text: str = ""
    at: ResolvedPoint | None = None
    whole: bool = True
    instructions: str | None = None
    held_instructions: bool | None = None
    tools: tuple[Message, ...] = ()
    variables: dict[str, object] = {}
    keep_sampled: bool = False
    continue_final_message: bool = False
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    branch: str | None = None
    note: str = ""
    """The commit's message."""
    policy: Policy = "exact"
    resume: bool = False
    forced: ForcedCalls | None = None
    """What the model must call; it then writes JSON alone."""
    single_call: bool = False
    """The answer ends after its first call."""
    followed: bool = False
    """What it says is told as it comes, and not only at its end."""


class SpokenPiece(msgspec.Struct, frozen=True, kw_only=True):
    """A step's news of a completion: its text and tokens, and what is certain by now of what was said."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    said: tuple[Said, ...] = ()


class RequestBegun(msgspec.Struct, frozen=True, kw_only=True):
    """What is known once the engine has taken a request. `num_known`: tokens that need not be read, as planned; the
    engine's own count comes with the outcome. `parent`: the commit that it continues from."""

    num_prompt_tokens: int
    num_known: int
    parent: str | None


class RequestOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a request became; it is committed as `point`. Counts are the engine's.

    `num_prefilled` tokens were run through the model before the first one was sampled, `num_cached` were not. `source`:
    where those came from. `created`: just before the commit. `said`: what its text says; `pieces`: in what pieces that
    was told, so that a stream can be told again.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None
    finish_reason: Literal["stop", "length", "abort"]
    stop_reason: str | int | None
    num_prompt: int
    num_cached: int
    num_prefilled: int
    point: str
    parent: str | None
    nbytes: int
    created: float
    seed: int
    forked_at: int | None
    num_dropped: int
    source: Literal["live", "stored", "new"]
    said: tuple[Said, ...]
    pieces: tuple[SpokenPiece, ...]
    ttft_s: float
    total_s: float
    engine: int = 0
    """The number of the engine that ran it."""

    @property
    def told(self) -> dict[str, object]:
        """What every reply says beside its own dialect's fields, as `thaw`."""
        told: dict[str, object] = {
            "point": self.point,
            "parent": self.parent,
            "prompt_tokens": self.num_prompt,
            "cached_tokens": self.num_cached,
            "prefilled_tokens": self.num_prefilled,
            "source": self.source,
            "seed": self.seed,
            "engine": self.engine,
        }
        if self.forked_at is not None:
            told |= {"forked_at": self.forked_at, "dropped_tokens": self.num_dropped}
        return told
