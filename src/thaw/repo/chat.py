"""Chat: whole conversations in, only what is new prefilled.

The conversation is rendered by the model's own template and compared with the session's tokens. When it starts with
them, the rest is appended. A template is not always prefix-stable (thinking that is stripped, tool calls that are
tokenised differently, a history that the caller changed): the session then goes on from the last common token, by a
fork, and the result says where and how many tokens that dropped.

A session that begins with plain text keeps it: the conversation starts at the first turn with a role.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from thaw.core.errors import InvalidRequest
from thaw.core.objects import Turn
from thaw.engines.base import Codec, Completion

Message = dict[str, object]


class ChatResult(msgspec.Struct, frozen=True, kw_only=True):
    """A completion, and what became of the session to get it.

    `num_new_tokens` were appended. `forked_at`: None when the conversation started with the session's tokens, else the
    token from which the session went on; the `num_dropped_tokens` after it are no longer part of this session.
    """

    completion: Completion
    num_new_tokens: int
    forked_at: int | None = None
    num_dropped_tokens: int = 0

    @property
    def text(self) -> str:
        return self.completion.text

    @property
    def message(self) -> Message:
        """The answer, to append to the conversation."""
        return {"role": "assistant", "content": self.completion.text}


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """How a conversation continues a session: keep `keep` tokens, then append `new`."""

    keep: int
    new: tuple[int, ...]
    role: str


def continue_with(
    codec: Codec,
    tokens: Sequence[int],
    turns: Sequence[Turn],
    messages: Sequence[Message],
    tools: Sequence[object] | None,
) -> Rendered:
    """Where the rendered conversation and the session part, and what comes after. Pure."""
    if not messages:
        raise InvalidRequest("chat: no messages; give the whole conversation, ending with what is to be answered")
    wanted = codec.render_chat(messages, add_generation_prompt=True, tools=tools)
    start = next((turn.start for turn in turns if turn.role is not None), len(tokens))
    common = _common(tokens[start:], wanted)
    return Rendered(keep=start + common, new=tuple(wanted[common:]), role=str(messages[-1].get("role", "user")))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
