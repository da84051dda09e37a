"""One session's way through one request: what it continues from, tokens in, tokens out, and when its turn ends."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from thaw.core.errors import NotHit
from thaw.core.objects import Turn
from thaw.engines.base import Completion, Delta, GenerateRequest
from thaw.engines.served import protocol
from thaw.engines.served.client.channel import refusal
from thaw.engines.served.client.session import Node, ServedSession
from thaw.engines.served.client.transport import Chunk
from thaw.engines.served.protocol import Answer
from thaw.engines.session.turns import completion


@dataclass
class ActiveRequest:
    """`want`: tokens of KV that the request starts from. `cached`: how many of them the engine counted; `cached_first`:
    likewise, before the first piece of a prompt that is read in several. `before`: where the session's KV was (node,
    own, num_kv, parked), and `turns_before`: what was said in it; both again when the engine never `answered`."""

    index: int
    session: ServedSession
    name: str
    prompt: list[int]
    request: GenerateRequest
    node: Node
    want: int
    prompt_start: int
    emit: Callable[[Delta], None]
    before: tuple[Node | None, bool, int, bool]
    turns_before: list[Turn]
    started: float = field(default_factory=time.perf_counter)
    cached: int = 0
    cached_first: int | None = None
    num_prompt: int = 0
    first_token_s: float | None = None
    reason: str | None = None
    stop_reason: str | int | None = None
    aborted: bool = False
    answered: bool = False
    closed: Turn | None = None

    def message(self, group: str | None, size: int) -> protocol.Run:
        """What the request says to the engine; it is the lane's `index` of `size` in its group."""
        node, turn = self.session.node, self.session.turn
        assert node is not None
        return protocol.Run(
            id=self.name,
            record=node.name,
            source=self.node.name if self.want else None,
            num_kv=self.want,
            group=group,
            group_size=size,
            group_place=self.index,
            ends_early=turn is not None and bool(turn.sampling.stop),
            grammar_from=turn.start if turn is not None and turn.sampling.structured_outputs is not None else None,
            points=() if turn is None else self._passed(turn.sampling.max_tokens),
            adapter=self.session.adapter,
        )

    def reading(self) -> protocol.Run:
        """What a request says that reads a prompt, or a piece of one."""
        assert self.session.node is not None
        source = self.node.name if self.want else None
        return protocol.Run(
            id=self.name, record=self.session.node.name, source=source, num_kv=self.want, adapter=self.session.adapter
        )

    def _passed(self, most: int) -> tuple[int, ...]:
        """The tokens that were asked for, from the prompt's end on, which an answer of `most` tokens passes."""
        count = len(self.session.tokens)
        return tuple(sorted(point for point in self.session.asked if count <= point < count + most))

    def goes_on(self, answer: Answer, end: int) -> None:
        """A piece of its prompt has been read, up to token `end`: the next begins there. Raises `NotHit` as `count`."""
        found = answer.local + answer.external
        self._require_found(found)
        assert self.session.node is not None
        self.cached_first = found if self.cached_first is None else self.cached_first
        self.node, self.want, self.name = self.session.node, end, secrets.token_hex(16)

    def take(
        self, chunk: Chunk, entropies: Sequence[float | None], eos: tuple[int, ...], limit: int, num_top: int
    ) -> None:
        """The chunk's tokens, one by one; what comes after the turn's end is not wanted."""
        session, turn = self.session, self.session.turn
        assert turn is not None
        if chunk.token_ids and self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self.started
        ids, logprobs, text = [], [], ""
        for i, token in enumerate(chunk.token_ids):
            if self.reason is not None:
                break
            logprob = chunk.logprobs[i]
            session.tokens.append(token)
            full, top = len(session.tokens) >= limit, _largest(chunk.tops[i], num_top)
            self.reason, self.stop_reason = turn.take(token, logprob, top, entropies[i], eos=eos, full=full)
            ids.append(token)
            logprobs.append(logprob)
        if not ids:
            return
        if self.reason is None:
            text = turn.stream.news(final=False)
            self._tell(ids, logprobs, text, None)
        else:
            self._end(ids, logprobs)

    def abort(self) -> None:
        """The turn ends here without a reason of its own."""
        if self.reason is None:
            self.reason = "abort"
            if self.session.turn is not None:
                self._end([], [])
            else:
                self._tell([], [], "", "abort")

    def _end(self, ids: list[int], logprobs: list[float]) -> None:
        turn = self.session.turn
        assert turn is not None
        self._tell(ids, logprobs, turn.rest(), self.reason)

    def _tell(self, ids: list[int], logprobs: list[float], text: str, reason: str | None) -> None:
        self.emit(
            Delta(
                index=self.index,
                session=self.session.ref,
                token_ids=tuple(ids),
                logprobs=tuple(logprobs),
                text=text,
                finish_reason=reason,  # type: ignore[arg-type]
            )
        )

    def close(self) -> None:
        """Freeze the turn into the session."""
        turn = self.session.turn
        if turn is not None:
            self.closed = turn.freeze(self.reason or "abort", self.stop_reason)
            self.session.turns.append(self.closed)
            self.session.turn = None

    def count(self, answer: Answer) -> None:
        """What the engine counted. Raises when the session's KV was not used as it must be."""
        session = self.session
        if answer.kind:
            raise refusal(answer)
        self.answered = True
        session.num_kv = min(answer.num_kv, max(len(session.tokens) - 1, 0))  # the last one always runs again
        self.cached = answer.local + answer.external
        if (self.aborted or self.reason == "abort") and self.cached == 0:
            return  # stopped before it began
        self._require_found(self.cached)

    def _require_found(self, found: int) -> None:
        if found < self.want and not self.session.share_prefix:
            raise NotHit(f"the engine counted {found} of {self.want} restored tokens as cached")

    def release(self) -> None:
        """The session is its owner's again, however the request ended."""
        self.close()
        if not self.answered:  # refused, or never there: what the session continued from is what it still has
            self._take_back()
        self.session.busy = None
        self.emit = nobody

    def _take_back(self) -> None:
        """The prompt too; not what was sampled, which the caller has."""
        session = self.session
        session.node, session.own, session.num_kv, session.parked = self.before
        if self.first_token_s is None:
            del session.tokens[self.prompt_start :]
            session.turns = self.turns_before

    def completion(self) -> Completion:
        cached = self.cached if self.cached_first is None else self.cached_first
        return completion(
            self.session,
            self.closed,
            num_cached=cached,
            num_prefilled=max(self.num_prompt - cached, 0),
            ttft_s=self.first_token_s,
            total_s=time.perf_counter() - self.started,
        )


def claim(
    index: int,
    session: ServedSession,
    request: GenerateRequest,
    emit: Callable[[Delta], None],
    dropped: Callable[[str], None],
) -> ActiveRequest:
    """Take the session for a request, until the lane's `release`; its KV is extended in a record of its own."""
    source, want = session.node, session.num_kv
    before = (source, session.own, want, session.parked)
    if not request.prompt:
        want = min(want, max(len(session.tokens) - 1, 0))
    if not session.own:
        session.node, session.own = Node(dropped), True
    assert session.node is not None
    lane = ActiveRequest(
        index, session, secrets.token_hex(16), list(request.prompt), request, source or session.node, want,
        len(session.tokens), emit, before, list(session.turns),
    )  # fmt: skip
    session.busy, session.parked = lane, False
    session.num_kv = want
    return lane


def nobody(_: Delta) -> None:
    """Who listens to a lane that has ended, or that only reads a prompt."""


def _largest(step: tuple[tuple[int, float], ...], count: int) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(step, key=lambda entry: (-entry[1], entry[0]))[:count]) if count else ()
