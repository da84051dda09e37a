"""States at an earlier token: which tokens, how much KV, which turns.

A point inside a state stores nothing new: it is the state's first k tokens. All but the last of them keep their KV;
the last one runs again through decode, exactly as the parent ran it. So a cut inside generated text is decode-exact,
and a cut inside a prompt equals any other fork at that point. A state's own end is as it was stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from thaw.core.objects import State, Turn

Decode = Callable[[Sequence[int]], str]


def num_kv_at(state: State, num_tokens: int) -> int:
    """Tokens whose KV is used at this point."""
    last = state.boundary
    if num_tokens == state.num_tokens and last is not None and last.hidden and last.position == num_tokens:
        return state.num_kv
    return min(max(num_tokens - 1, 0), state.num_kv)


def cut_turns(turns: Sequence[Turn], tokens: Sequence[int], num_tokens: int, decode: Decode | None) -> tuple[Turn, ...]:
    """The turns of the first `num_tokens` tokens. A completion that is cut is unfinished: `resume` repeats the parent.

    `decode` gives a cut turn its text; without one its text is empty.
    """
    out = [turn for turn in turns if turn.end <= num_tokens]
    if len(out) < len(turns) and turns[len(out)].start < num_tokens:
        out.append(_truncate(turns[len(out)], tokens, num_tokens, decode))
    return tuple(out)


def _truncate(turn: Turn, tokens: Sequence[int], end: int, decode: Decode | None) -> Turn:
    n = end - turn.start
    return msgspec.structs.replace(
        turn,
        end=end,
        text=decode(tokens[turn.start : end]) if decode else "",
        finish_reason=None,
        stop_reason=None,
        logprobs=None if turn.logprobs is None else turn.logprobs[:n],
        top_logprobs=None if turn.top_logprobs is None else turn.top_logprobs[:n],
        entropies=turn.entropies and turn.entropies[:n],
    )


def unfinished(turns: Sequence[Turn]) -> bool:
    """Whether the last turn is a completion that may be resumed."""
    return bool(turns) and turns[-1].kind == "completion" and turns[-1].finish_reason is None
