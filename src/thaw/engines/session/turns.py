"""What was said in a session, of any engine: the completion that grows, and the turns that it and the prompts become.

No KV here, and nothing of an engine.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from thaw.core.canonical import U64
from thaw.core.errors import InvalidRequest, PolicyMismatch
from thaw.core.objects import Chat, Turn, with_chat
from thaw.core.proof import Proof
from thaw.core.sampling import Sampling
from thaw.engines.base import Codec, Completion, GenerateRequest, SessionRef, Usage
from thaw.engines.session.bad_words import BadIds, bad_ids
from thaw.engines.session.text import TextStream


@dataclass
class OpenTurn:
    """The completion being generated: everything in `Turn`, still growing. `bad_ids`: its bad words, as token ids.
    `unseen_stops`: those of its stop strings that are a token which the text leaves out."""

    start: int
    sampling: Sampling
    seed: int
    policy: str
    role: str | None
    stream: TextStream
    bad_ids: BadIds = ()
    unseen_stops: Mapping[int, str] = field(default_factory=dict)
    logprobs: list[float] = field(default_factory=list)
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)

    def take(
        self,
        token: int,
        logprob: float,
        top: tuple[tuple[int, float], ...],
        entropy: float | None,
        *,
        eos: Container[int],
        full: bool,
    ) -> tuple[str | None, str | int | None]:
        """One more token; (finish_reason, stop_reason) after it, in vLLM's order. `full`: the session has no room."""
        self.logprobs.append(logprob)
        self.tops.append(top)
        if entropy is not None:
            self.entropies.append(entropy)
        self.stream.push(token)
        s, num_output = self.sampling, len(self.logprobs)
        if num_output >= s.min_tokens:
            if token in eos and not s.ignore_eos:
                return "stop", None
            if token in s.stop_token_ids:
                return "stop", token
        if num_output > s.min_tokens or s.min_tokens == 0:
            hit = self.unseen_stops.get(token) or self.stream.cut_at_stop()
            if hit is not None:
                return "stop", hit
        return ("length", None) if num_output >= s.max_tokens or full else (None, None)

    def rest(self) -> str:
        """The text that was held back, once the turn has ended."""
        return self.stream.news(final=True)

    def freeze(self, reason: str | None = None, stop_reason: str | int | None = None) -> Turn:
        """The turn as a value; with `reason` None it is an unfinished one."""
        return Turn(
            kind="completion",
            start=self.start,
            end=self.start + len(self.logprobs),
            role=self.role,
            text=self.stream.text,
            sampling=self.sampling,
            seed=U64(self.seed),
            finish_reason=reason,  # type: ignore[arg-type]
            stop_reason=stop_reason,
            logprobs=tuple(self.logprobs),
            top_logprobs=tuple(self.tops) if self.sampling.logprobs else None,
            policy=self.policy,
            entropies=tuple(self.entropies) if self.sampling.entropy else msgspec.UNSET,
        )


class HasTurns(Protocol):
    """Any engine's session, as far as its turns go."""

    ref: SessionRef
    tokens: list[int]
    turns: list[Turn]
    seed: int
    policy: str
    proof: Proof | None


def require_resumable(session: HasTurns, request: GenerateRequest, policy: str) -> Turn:
    """The completion that `request` goes on with. Raises `InvalidRequest`, and `PolicyMismatch` when it was begun under
    another policy: a turn is of one."""
    last = session.turns[-1] if session.turns else None
    if request.prompt or request.sampling is not None:
        raise InvalidRequest("resume goes on with the interrupted completion: give neither prompt nor sampling")
    if last is None or last.kind != "completion" or last.finish_reason not in (None, "abort"):
        raise InvalidRequest("resume: the session's last turn is not an interrupted completion; use generate")
    if last.policy != policy:
        raise PolicyMismatch(
            f"resume: the completion was begun under policy {last.policy!r}; the engine now runs {policy!r}, and its "
            "tokens would be of no one policy. Use generate: what follows is then a completion of its own."
        )
    return last


def open_turn(session: HasTurns, request: GenerateRequest, codec: Codec) -> OpenTurn:
    """The completion that `request` asks for: a new one, or the last one taken up again."""
    if request.resume:
        return _reopen(session, codec)
    assert request.sampling is not None
    seed = request.sampling.seed
    return OpenTurn(
        start=len(session.tokens),
        sampling=request.sampling,
        seed=session.seed if seed is None else int(seed),
        policy=session.policy,
        role="assistant" if request.role is not None else None,
        stream=TextStream(codec, session.tokens, request.sampling.stop),
        bad_ids=bad_ids(codec, request.sampling.bad_words),
        unseen_stops=_unseen_stops(codec, request.sampling),
    )


def _reopen(session: HasTurns, codec: Codec) -> OpenTurn:
    """Take the unfinished (or aborted) last completion back up, replaying its tokens into the text stream."""
    turn = session.turns.pop()
    assert turn.sampling is not None
    stream = TextStream(codec, session.tokens[: turn.start], turn.sampling.stop)
    for token in session.tokens[turn.start : turn.end]:
        stream.push(token)
    stream.news(final=False)  # was given before the interruption
    return OpenTurn(
        start=turn.start,
        sampling=turn.sampling,
        seed=int(turn.seed if turn.seed is not None else session.seed),
        policy=turn.policy,
        role=turn.role,
        stream=stream,
        bad_ids=bad_ids(codec, turn.sampling.bad_words),
        unseen_stops=_unseen_stops(codec, turn.sampling),
        logprobs=list(turn.logprobs or ()),
        tops=list(turn.top_logprobs or ()),
        entropies=list(turn.entropies or ()),
    )


def _unseen_stops(codec: Codec, sampling: Sampling) -> dict[int, str]:
    """Stop strings that no text could show: an end of a turn, for one, under `ignore_eos`."""
    ids = {stop: codec.encode(stop, first=False) for stop in sampling.stop}
    return {found[0]: stop for stop, found in ids.items() if len(found) == 1 and not codec.decode(found)}


def settle_turn(session: HasTurns) -> None:
    """A completion left unfinished becomes an aborted one when something else follows it."""
    last = session.turns[-1] if session.turns else None
    if last is not None and last.kind == "completion" and last.finish_reason is None:
        session.turns[-1] = msgspec.structs.replace(last, finish_reason="abort")


def close_prompt(session: HasTurns, start: int, text: str, role: str | None, chat: Chat | None = None) -> None:
    """Record what was appended from token `start` on as a prompt turn; `chat` only where it was appended whole."""
    end = len(session.tokens)
    if end > start:
        turn = Turn(kind="prompt", start=start, end=end, role=role, text=text, policy=session.policy)
        session.turns.append(turn if chat is None else with_chat(turn, chat))


def completion(
    session: HasTurns, turn: Turn | None, *, num_cached: int, num_prefilled: int, ttft_s: float | None, total_s: float
) -> Completion:
    """What a request brought. `turn` None: it was stopped before its completion began."""
    start, end = (turn.start, turn.end) if turn else (len(session.tokens), len(session.tokens))
    return Completion(
        session=session.ref,
        text=turn.text if turn else "",
        token_ids=tuple(session.tokens[start:end]),
        logprobs=(turn.logprobs or ()) if turn else (),
        top_logprobs=turn.top_logprobs if turn else None,
        finish_reason=turn.finish_reason if turn else "abort",
        stop_reason=turn.stop_reason if turn else None,
        seed=int(turn.seed or 0) if turn else session.seed,
        usage=Usage(
            num_prompt_tokens=start,
            num_cached_tokens=num_cached,
            num_prefilled_tokens=num_prefilled,
            num_completion_tokens=end - start,
        ),
        proof=session.proof,
        ttft_s=ttft_s or 0.0,
        total_s=total_s,
        entropies=(turn.entropies or None) if turn else None,
    )


def reseed(session: HasTurns, seed: int) -> None:
    """Give a fork's child its own seed, also in a completion that was cut through."""
    session.seed = seed
    turn = session.turns[-1] if session.turns else None
    if turn is not None and turn.kind == "completion" and turn.finish_reason is None:
        session.turns[-1] = msgspec.structs.replace(turn, seed=U64(seed))
