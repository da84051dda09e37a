"""A session as the client knows it: tokens, turns, and which record in the engine holds its KV."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from thaw.core.objects import Turn
from thaw.core.proof import Proof
from thaw.engines.base import SessionRef, SessionView
from thaw.engines.embedded.session import OpenTurn


class Node:
    """A record in the engine, shared by the session that extends it and by what was forked from it. When nobody
    refers to it any more, its name is handed to `dropped`, to be told to the engine with the next message."""

    def __init__(self, dropped: Callable[[str], None]) -> None:
        self.name = secrets.token_hex(16)
        weakref.finalize(self, dropped, self.name).atexit = False


@dataclass
class ServedSession:
    """`num_kv` tokens have KV in `node`; `own`: this session is the one that extends it."""

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
    busy: object | None = None
    parked: bool = False

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
