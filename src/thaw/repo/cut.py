"""States at an earlier token: which tokens, how much KV, which turns.

A point inside a state stores nothing new: it is the state's first k tokens. All but the last of them keep their KV;
the last one runs again through decode, exactly as the parent ran it. So a cut inside generated text is decode-exact,
and a cut inside a prompt equals any other fork at that point. A state's own end is as it was stored.
"""

from __future__ import annotations

from collections.abc import Sequence

from thaw.core.objects import State, Turn


def num_kv_at(state: State, num_tokens: int) -> int:
    """Tokens whose KV is used at this point."""
    last = state.boundary
    if num_tokens == state.num_tokens and last is not None and last.hidden and last.position == num_tokens:
        return state.num_kv
    return min(max(num_tokens - 1, 0), state.num_kv)


def unfinished(turns: Sequence[Turn]) -> bool:
    """Whether the last turn is a completion that may be resumed."""
    return bool(turns) and turns[-1].kind == "completion" and turns[-1].finish_reason is None
