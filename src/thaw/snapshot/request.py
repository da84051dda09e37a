"""A request: what is to be generated in a session, and what came of it so far.

It outlives the process that began it: its id, place in the queue and offset are in a snapshot, and whoever followed it
goes on at the token after the last one that he has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from thaw.core.errors import Cancelled, InvalidRequest, LawBroken, ThawError, TimedOut
from thaw.core.objects import Turn
from thaw.core.sampling import Sampling
from thaw.engines.base import Completion, SessionView
from thaw.repo.session import Session
from thaw.repo.stream import Stream
from thaw.snapshot.outputs import GivenTokens, OutputPiece, RequestOutput

Status = Literal["waiting", "running", "interrupted", "finished", "failed"]
ENDED = ("finished", "failed")


class QueuedRequest:
    """Made by a `RequestQueue`. Safe from any thread.

    `number`: its place among arrivals. `start`: how many tokens of the session lie before its output. `prompt`: the
    tokens that are appended first; those that the session has by now are not appended again.
    """

    def __init__(
        self,
        id: str,
        session: Session,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        start: int,
        priority: int = 0,
        number: int = 0,
        before: GivenTokens = GivenTokens(),  # noqa: B008 - a value
    ) -> None:
        self.id, self.session, self.priority, self.number = id, session, priority, number
        self.prompt, self.sampling, self.start = tuple(prompt), sampling, start
        self.status: Status = "waiting"
        self.error: ThawError | None = None
        self.finish_reason: str | None = None
        self.num_prefilled = 0
        """Tokens that were run through the model before the first sampled one, since it was last taken up."""
        self._output = RequestOutput(before)
        self._news = threading.Condition()
        self._stream: Stream[Completion] | None = None
        self._stopped = self._paused = False
        self.on_change: Callable[[], None] = lambda: None
        """Told when it has ended."""

    # -- for whoever asked

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What was generated so far."""
        with self._news:
            return tuple(self._output.tokens[: self._output.num_visible])

    @property
    def num_tokens(self) -> int:
        """How many were generated so far."""
        return len(self._output.tokens)

    @property
    def text(self) -> str:
        with self._news:
            tail = self._output.tail if self.ended else ""
            return "".join(self._output.texts[: self._output.num_visible]) + tail

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    def stream(self, offset: int = 0, *, seen: Sequence[int] | None = None) -> Iterator[OutputPiece]:
        """The output from token `offset` on, until it ends. `seen`: the tokens that the caller has; the output goes on
        behind them. Raises `LawBroken` where it does not begin with them, and what ended the request."""
        if seen is not None and offset not in (0, len(seen)):
            raise InvalidRequest(f"offset={offset} and {len(seen)} tokens seen: give one of the two")
        offset = offset if seen is None else len(seen)
        if offset < 0:
            raise InvalidRequest(f"offset={offset}: a number of tokens, 0 or more")
        self._require_seen(offset, seen)
        while True:
            piece, over = self._next(offset)
            if piece.token_ids:
                yield piece
                offset += len(piece.token_ids)
            elif over:
                break
        self._raise()
        if self._output.tail:
            yield OutputPiece(offset=offset, token_ids=(), logprobs=(), text=self._output.tail)

    def result(self, timeout: float | None = None) -> tuple[int, ...]:
        """All token ids, once it has ended. Raises what ended it instead, and `TimedOut`."""
        with self._news:
            if not self._news.wait_for(lambda: self.ended, timeout):
                raise TimedOut(f"request {self.id} has not ended within {timeout} s; it goes on (cancel() stops it)")
        self._raise()
        return self.token_ids

    def cancel(self) -> None:
        """End it at the next token; the session keeps what it has. One that waits never begins."""
        with self._news:
            self._stopped = True
            stream = self._stream
            if self.status in ("waiting", "interrupted"):
                self._end("failed", Cancelled(f"request {self.id} was cancelled before it ended"))
        if stream is not None:
            stream.cancel()

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    def _require_seen(self, offset: int, seen: Sequence[int] | None) -> None:
        """Wait for the first `offset` tokens, and compare."""
        with self._news:
            self._news.wait_for(lambda: self._output.num_visible >= offset or self.ended)
            tokens = tuple(self._output.tokens[:offset])
        if len(tokens) < offset:
            self._raise()
            raise LawBroken(f"request {self.id} ended after {len(tokens)} tokens, and {offset} were given out before")
        if seen is not None and tokens != tuple(seen):
            at = next(i for i, (a, b) in enumerate(zip(tokens, seen, strict=True)) if a != b)
            raise LawBroken(
                f"request {self.id}: token {at} of its output is {tokens[at]}, and {seen[at]} was given out before"
            )

    def _next(self, offset: int) -> tuple[OutputPiece, bool]:
        with self._news:
            self._news.wait_for(lambda: self._output.num_visible > offset or self.ended)
            return self._output.piece(offset), self.ended

    # -- for the queue

    def given(self) -> tuple[int, list[int]]:
        """How many tokens somebody has taken, and all tokens."""
        with self._news:
            return self._output.num_seen, list(self._output.tokens)

    def begin(self) -> Stream[Completion]:
        """Go on from where the session stands. Raises what the engine raises."""
        turn = self.own_turn(view := self.session.view())
        if turn is not None:
            stream = self.session.resume_stream()
        else:
            rest = self.prompt[len(self.prompt) - max(0, self.start - len(view.tokens)) :]
            stream = self.session.stream("", self.sampling, token_ids=rest)
        with self._news:
            self._stream, self.status = stream, "running"
            self._news.notify_all()
            if self._stopped or self._paused:
                stream.cancel()
        return stream

    def own_turn(self, view: SessionView) -> Turn | None:
        """Its completion in the session, where that has begun."""
        last = view.turns[-1] if view.turns else None
        if last is None or last.kind != "completion" or last.start != self.start:
            return None
        return last

    def take_up(self, view: SessionView) -> None:
        """Begin with what the session holds of it; ended where its completion is whole. Raises `LawBroken`."""
        turn = self.own_turn(view)
        if turn is None:
            return
        with self._news:
            tokens = view.tokens[turn.start : turn.end]
            self._output.replay(self.session.engine.codec, view.tokens[: turn.start], turn, tokens, self._what)
            if turn.finish_reason in ("stop", "length"):
                self._end_as(turn.finish_reason)

    @property
    def _what(self) -> str:
        return f"request {self.id}"

    def follow(self, stream: Stream[Completion], told: Callable[[QueuedRequest], None]) -> Completion:
        """Take the engine's news until the end, and tell of each. Raises what ends it: `LawBroken`, `Drained` …"""
        for delta in stream:
            with self._news:
                try:
                    self._output.take(delta, self._what)
                except LawBroken:
                    stream.cancel()
                    raise
                self._news.notify_all()
            told(self)
        return stream.result()

    def finish(self, done: Completion) -> None:
        with self._news:
            self.num_prefilled = done.usage.num_prefilled_tokens
            if done.finish_reason == "abort" and self._paused and not self._stopped:
                self.status, self._stream = "interrupted", None
                self._news.notify_all()
            elif done.finish_reason == "abort":
                self._end("failed", Cancelled(f"request {self.id} was cancelled; the session keeps what it has"))
            else:
                self._end_as(done.finish_reason)

    def _end_as(self, reason: str | None) -> None:
        self.finish_reason = reason
        short = self._output.expected.num > len(self._output.tokens)
        if short:
            self._end("failed", LawBroken(
                f"{self._what} ended after {len(self._output.tokens)} tokens, and {self._output.expected.num} were "
                "given out before"
            ))  # fmt: skip
        else:
            self._end("finished", None)

    def stop(self) -> None:
        """Cut it short at the next token: it is interrupted then, and goes on later. One that ends by itself first has
        ended."""
        with self._news:
            self._paused, stream = True, self._stream
        if stream is not None:
            stream.cancel()

    def interrupt(self) -> None:
        """It was cut short, and goes on later."""
        with self._news:
            self.status, self._stream = "interrupted", None
            self._news.notify_all()

    def resume(self) -> None:
        """Wait for its turn again, if it was cut short."""
        with self._news:
            self._paused = False
            if self.status == "interrupted":
                self.status = "waiting"

    def fail(self, error: ThawError) -> None:
        with self._news:
            self._end("failed", error)

    def _end(self, status: Status, error: ThawError | None) -> None:
        self.status, self.error, self._stream = status, error, None
        self._news.notify_all()
        self.on_change()

    def move_to(self, session: Session) -> None:
        """It goes on in another session, which stands where this one stood."""
        with self._news:
            self.session, self.status, self._paused = session, "waiting", False
            self._news.notify_all()

    def __repr__(self) -> str:
        return f"<QueuedRequest {self.id} {self.status}, {len(self._output.tokens)} tokens>"
