"""A session as the client knows it: tokens, turns, and which record in the engine holds its KV."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from thaw.core.cache import list_of
from thaw.core.errors import NotKept
from thaw.core.objects import Turn
from thaw.core.proof import Continuation, Proof
from thaw.engines.base import Codec, SessionRef, SessionView, Slice
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
    request that runs now. `late`: the groups of which earlier tokens are not there.
    `adapter`: the id of the one under which all of it is computed. `loaded`: what it was hydrated from.

    Of a model that keeps states, `points` are the numbers of tokens after which it has one, and `num_kv` is one of them
    (or 0); what comes after is a prompt that is still to be read. `asked`: those after which it is to have one, read or
    to come. `behind`: some of it was sampled, for the engine has gone past the session's end, and the state there is
    gone."""

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
    points: tuple[int, ...] = ()
    asked: frozenset[int] = frozenset()
    behind: bool = False
    late: tuple[LateGroup, ...] = ()
    adapter: str | None = None
    loaded: tuple[Slice, ...] = ()

    def all_turns(self) -> tuple[Turn, ...]:
        return (*self.turns, self.turn.freeze()) if self.turn is not None else tuple(self.turns)

    def computed(self) -> int:
        """Tokens that certainly have KV by now: of a session that decodes, all but the last one seen."""
        if self.turn is not None and self.turn.logprobs:
            return max(self.num_kv, len(self.tokens) - 1)
        return self.num_kv

    def kept(self, want: int, found: Collection[int]) -> None:
        """A request has ended that began after `want` tokens; the engine has states after `found` ones. The last token
        of the session runs again, so what counts is the state before it, and what was asked for."""
        count, last = len(self.tokens), max(len(self.tokens) - 1, 0)
        wanted = {last, *(point for point in self.asked if point <= count)}
        points = {point for point in (*self.points, want) if 0 < point <= want} | (wanted & set(found))
        self.points = tuple(sorted(points))
        self.behind = bool(last) and not points & {last, count} and self._sampled_after(max(points, default=0))
        if last in points or not last:
            self.num_kv = last
        else:
            self.num_kv = max((point for point in points if point <= count), default=0)

    def ask(self, tokens: Collection[int]) -> None:
        """States after these numbers of tokens are to be kept. Raises `NotKept` for what has been read without."""
        gone = {token for token in tokens if token <= self.num_kv} - set(self.points)
        if gone:
            raise NotKept(
                f"no state is kept after {list_of(gone)}, which this session has read already: it has states after "
                f"{list_of(self.points)}. Ask for a state before its tokens are appended"
            )
        self.asked |= set(tokens)

    def stops(self, until: int) -> list[int]:
        """The tokens up to `until` at which a prefill stops, because a state was asked for there."""
        return sorted(token for token in self.asked if self.num_kv < token <= until)

    def to_read(self, count: int) -> list[int]:
        """Where the prefills end, one by one, that read its first `count` tokens: all but the last, which runs with
        what follows. A state after all of them comes with that."""
        ends = {*self.stops(count - 1), count - 1}
        return sorted(end for end in ends if end > self.num_kv)

    def _sampled_after(self, point: int) -> bool:
        """Whether sampled tokens, beside the session's last one, would be read again to come from there to its end."""
        last = len(self.tokens) - 1
        return any(turn.kind != "prompt" and max(turn.start, point) < min(turn.end, last) for turn in self.turns)

    def before(self, at: int) -> int:
        """How many tokens of KV a child of the first `at` tokens continues with: all but the last, which runs again; or
        all, where the state after it alone is kept. Raises `NotKept`."""
        last = max(at - 1, 0)
        if not last or last in self.points:
            return last
        if at in self.points:
            return at
        raise NotKept(
            f"no state is kept after {last} tokens, which is what a fork at token {at} goes on from: this session has "
            f"states after {list_of(self.points)}. Fork at one token more than one of these, {NotKept.way_out}"
        )

    def require_state(self) -> None:
        """Raise `NotKept` where the session cannot go on, because the state at its end is gone."""
        if self.behind:
            raise NotKept(
                f"no state is kept after {len(self.tokens) - 1} tokens: the engine had gone on when the session was "
                f"stopped there, and it has states after {list_of(self.points)}. Fork at one token more than one of "
                f"these, {NotKept.way_out}"
            )

    def require_next(self) -> None:
        """Raise `NotKept` where nothing says what follows: the state before the last token is gone."""
        count = len(self.tokens)
        if self.num_kv == count > 0:
            raise NotKept(
                f"the state after {count} tokens is kept and the one before the last of them is not, so it goes on "
                f"with new tokens alone: give a prompt, fork at token {count + 1}, whose last token runs again, "
                f"{NotKept.way_out}"
            )

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
            adapter=self.adapter,
        )


def lineage_salt() -> str:
    """Of a new lineage: no other finds its blocks."""
    return f"{protocol.SALT}{secrets.token_hex(16)}"


def new_session(
    policy: str, seed: int, salt: str | None, share_prefix: bool, adapter: str | None = None
) -> ServedSession:
    own = secrets.token_hex(16)
    return ServedSession(
        ref=SessionRef(secrets.token_hex(16)),
        seed=seed,
        salt=own if salt is None else salt,
        share_prefix=share_prefix,
        policy=policy,
        cache_salt=_shared_salt(salt, adapter) if share_prefix else f"{protocol.SALT}{own}",
        adapter=adapter,
    )


def _shared_salt(salt: str | None, adapter: str | None) -> str:
    """Of sessions that share their blocks: with all of the same adapter's content, for a server knows it by a name."""
    return (salt or "") if adapter is None else f"{adapter}:{salt or ''}"


def with_gap(proof: Proof, num_kv: int, reason: str) -> Proof:
    """The proof of a session whose tokens from `num_kv` on are read again."""
    return msgspec.structs.replace(
        proof,
        first_mismatch=num_kv,
        num_recomputed_tokens=proof.num_prompt_tokens - num_kv,
        continuation="close",
        reason=reason,
    )


def forked(
    parent: ServedSession, at: int, codec: Codec, continuation: Continuation, *, keeps_states: bool = False,
    nearest: bool = False,
) -> ServedSession:  # fmt: skip
    """A child that continues from the parent's first `at` tokens, on the parent's record and with its seed. `nearest`:
    it has the KV up to the nearest point before these, where there is one, and not all. Raises `NotKept` where what the
    child needs is not there."""
    computed = parent.computed()
    num_kv = computed if at == len(parent.tokens) else min(computed, max(at - 1, 0))
    if nearest:
        num_kv = max((point for point in parent.points if point < at), default=0)
    elif keeps_states:
        num_kv = parent.num_kv if at == len(parent.tokens) and not parent.behind else parent.before(at)
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
        points=tuple(point for point in parent.points if point <= num_kv),
        asked=frozenset(point for point in parent.asked if point <= at),
        turns=list(cut_turns(parent.all_turns(), parent.tokens, at, codec)),
        late=parent.late if num_kv else (),
        adapter=parent.adapter,
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
