"""What a chat model is asked and what it answers, in a form that engine and gateway share. Values only.

ChatAsk      the conversation, the points in it, how to sample, how many answers
AnswerPart   news of an answer under way: text, or a call of a tool
ChatAnswer   an answer that is over, and committed
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Protocol

import msgspec

from thaw.core.sampling import Sampling, derive, fresh_seed
from thaw.engines.base import Message
from thaw.integrations.langgraph.messages import CarriedPoint


class ChatAsk(msgspec.Struct, frozen=True, kw_only=True):
    """`carried`: points of the messages, in the order in which to try them. `n`: answers, as one batch. `note`: the
    commits' message."""

    messages: tuple[Message, ...]
    carried: tuple[CarriedPoint, ...] = ()
    tools: tuple[Message, ...] = ()
    variables: dict[str, object] = {}
    sampling: Sampling = Sampling()
    n: int = 1
    keep_sampled: bool = False
    note: str = ""

    def samplings(self) -> list[Sampling]:
        """One for each answer, with a seed of its own: siblings of one point do not say the same."""
        given = self.sampling.seed
        seeds = [fresh_seed() if given is None else derive(int(given), 0, i) if i else given for i in range(self.n)]
        return [msgspec.structs.replace(self.sampling, seed=seed) for seed in seeds]


class CallMade(msgspec.Struct, frozen=True, kw_only=True):
    """`arguments` is JSON text."""

    id: str
    name: str
    arguments: str


class AnswerPart(msgspec.Struct, frozen=True, kw_only=True):
    text: str = ""
    call: CallMade | None = None


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`num_cached`: tokens of the prompt that were not computed, by the engine's count. `record`: what the message says
    about thaw, its point first."""

    text: str
    calls: tuple[CallMade, ...]
    finish_reason: str
    num_prompt: int
    num_cached: int
    num_completion: int
    record: dict[str, object]


class ChatSource(Protocol):
    """Where answers come from. Streams are of one answer, and end with it."""

    @property
    def model(self) -> str: ...

    def answers(self, ask: ChatAsk) -> list[ChatAnswer]: ...

    def stream(self, ask: ChatAsk) -> Iterator[AnswerPart | ChatAnswer]: ...

    async def aanswers(self, ask: ChatAsk) -> list[ChatAnswer]: ...

    def astream(self, ask: ChatAsk) -> AsyncIterator[AnswerPart | ChatAnswer]: ...

    def require_structured(self) -> None: ...

    def close(self) -> None: ...


def reread(kind: str, why: str) -> dict[str, object]:
    """Of a record: the messages' own point could not be used, so its tokens were read again."""
    return {"reread": {"kind": kind, "why": why}}
