"""A session as the client knows it: tokens, turns, and which record in the engine holds its KV."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from thaw.core.objects import Turn
from thaw.core.proof import Continuation, Proof
from thaw.engines.base import Codec, SessionRef, SessionView
from thaw.engines.served import protocol
from thaw.engines.served.late_groups import LateGroup, require_kept
from thaw.engines.session.turns import OpenTurn
from thaw.engines.text import cut_turns

if TYPE_CHECKING:
    from thaw.engines.served.client.request import ActiveRequest


class Node:
    """A record in the engine, shared by the session that extends it and by what was forked from it. When nobody
    refers to it any more, its name is handed to `dropped`, to be told to the engine with the next message."""

    def __init__(self, dropped: Callable[[str], None]) -> None:
        self.name = secrets.token_hex(16)
        weakref.finalize(self, dropped, self.name).atexit = False


@dataclass
class ServedSession:
    """`num_kv` tokens have KV in `node`; `own`: this session is the one that extends it. `busy`: its way through the
    request that runs now. `late`: the groups of which earlier tokens are not there."""

    ref: SessionRef
    seed: int
    salt: str
    share_prefix: bool
    policy: str
    cache_salt: str
    node: Node | None = None
    own: bool = False
    num_kv: int = 0
    tokens: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    turn: OpenTurn | None = None
    proof: Proof | None = None
    busy: ActiveRequest | None = None
    parked: bool = False
    late: tuple[LateGroup, ...] = ()

    def all_turns(self) -> tuple[Turn, ...]:
        return (*self.turns, self.turn.freeze()) if self.turn is not None else tuple(self.turns)

    def computed(self) -> int:
        """Tokens that certainly have KV by now: of a session that decodes, all but the last one seen."""
        if self.turn is not None and self.turn.logprobs:
            return max(self.num_kv, len(self.tokens) - 1)
        return self.num_kv

    def view(self) -> SessionView:
        return SessionView(
            tokens=tuple(self.tokens),
            num_kv=self.computed(),
            turns=self.all_turns(),
            seed=self.seed,
            salt=self.salt,
            running=self.busy is not None,
            parked=self.parked,
            proof=self.proof,
        )


def lineage_salt() -> str:
    """Of a new lineage: no other finds its blocks."""
    return f"{protocol.SALT}{secrets.token_hex(16)}"


def new_session(policy: str, seed: int, salt: str | None, share_prefix: bool) -> ServedSession:
    own = secrets.token_hex(16)
    return ServedSession(
        ref=SessionRef(secrets.token_hex(16)),
        seed=seed,
        salt=own if salt is None else salt,
        share_prefix=share_prefix,
        policy=policy,
        cache_salt=(salt or "") if share_prefix else f"{protocol.SALT}{own}",
    )


def forked(parent: ServedSession, at: int, codec: Codec, continuation: Continuation) -> ServedSession:
    """A child that goes on from the parent's first `at` tokens, on the parent's record and with its seed. Raises
    `NotKept`."""
    computed = parent.computed()
    num_kv = computed if at == len(parent.tokens) else min(computed, max(at - 1, 0))
    require_kept(parent.late, num_kv)
    # Blocks of a lineage are found by its salt; where it has not all groups of the first ones, nobody reads them anew.
    apart = parent.late and not num_kv
    return ServedSession(
        ref=SessionRef(secrets.token_hex(16)),
        seed=parent.seed,
        salt=parent.salt,
        share_prefix=parent.share_prefix,
        policy=parent.policy,
        cache_salt=lineage_salt() if apart else parent.cache_salt,
        node=parent.node if num_kv else None,
        num_kv=num_kv,
        tokens=parent.tokens[:at],
        turns=list(cut_turns(parent.all_turns(), parent.tokens, at, codec)),
        late=parent.late if num_kv else (),
        proof=Proof(
            num_prompt_tokens=at,
            num_cached_tokens=num_kv,
            matched=num_kv,
            first_mismatch=None,
            verification="live-shared",
            continuation=continuation,
            share_prefix=parent.share_prefix,
        ),
    )
