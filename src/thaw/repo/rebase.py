"""Rebase: the same tokens under other weights, and how far their log probabilities have moved.

Prompts are prefilled and every sampled token is decoded again, one step each as it was sampled, by the engine that runs
now: a bias decides the token, and log probabilities are of the raw logits, which no bias touches. Stored KV is neither
loaded nor asked for. With a branch, the session is also kept as it then goes on: its tokens and turns, prefilled under
the weights that run now.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from thaw.core.errors import InvalidRequest, Refused, TooLong
from thaw.core.identity import ModelIdentity, compare
from thaw.core.ids import CommitId
from thaw.core.objects import AnyTurn
from thaw.core.sampling import Sampling
from thaw.engines.base import Completion, Engine, GenerateRequest, SessionRef, adapter_there
from thaw.engines.text import cut_turns
from thaw.repo.context import Context
from thaw.repo.resolve import ResolvedPoint
from thaw.repo.timeline import read, read_state

FORCED = 100.0
"""The largest bias: a token whose logit lies further below the largest one than this cannot be decided."""


class TokenDrift(msgspec.Struct, frozen=True, kw_only=True):
    """A sampled token at `position`. `stored` and `now`: its raw log probability then and now, in nats; None where the
    engine that runs now gives it less than e^-100. `margin`: by how much the likeliest token (`best`) is likelier now;
    0 where it is this one. `policy`: which sampled it."""

    position: int
    token_id: int
    stored: float
    now: float | None
    margin: float | None
    best: int
    policy: str

    @property
    def drift(self) -> float | None:
        """now - stored."""
        return None if self.now is None else self.now - self.stored


class Rebase(msgspec.Struct, frozen=True, kw_only=True):
    """`changed`: what of the model differs from the one that the point is of, by its fields' names; empty where nothing
    does. `commit`: of the branch, where one was asked for."""

    point: str
    num_tokens: int
    policy: str
    changed: str
    drifts: tuple[TokenDrift, ...]
    branch: str | None = None
    commit: CommitId | None = None

    @property
    def measured(self) -> list[float]:
        return [one.drift for one in self.drifts if one.drift is not None]

    @property
    def mean(self) -> float:
        """The mean drift: below 0, the tokens have become less likely. Minus this estimates the divergence of the new
        policy from the old one, where the tokens were sampled from the raw distribution."""
        return sum(self.measured) / len(self.measured) if self.measured else 0.0

    @property
    def largest(self) -> float:
        """The largest drift in either direction."""
        return max((abs(one) for one in self.measured), default=0.0)

    @property
    def num_not_best(self) -> int:
        """Tokens that greedy decoding would not choose now."""
        return sum(one.best != one.token_id for one in self.drifts)


def rebase(context: Context, where: ResolvedPoint) -> Rebase:
    """Replay the point in the running engine. Raises `Refused` for another tokenizer, `InvalidRequest` where nothing
    was sampled, `TooLong`."""
    engine = context.engine
    timeline = read(context.store, read_state(context.store, where.state))
    turns = cut_turns(timeline.turns, timeline.tokens, where.num_tokens, engine.codec)
    if not any(turn.kind == "completion" and turn.end > turn.start for turn in turns):
        raise InvalidRequest(f"nothing was sampled before {where}: there is no log probability to compare")
    if where.num_tokens >= engine.info.max_model_len:
        raise TooLong(f"{where} has {where.num_tokens} tokens and the engine takes {engine.info.max_model_len}")
    stored = context.store.get_as(timeline.state.model, ModelIdentity)
    adapter = adapter_there(engine, stored.adapter)
    changed = _changed(stored, engine, adapter)
    with context.admission.beginning():
        replay = _Replay(engine, adapter)
        try:
            drifts = tuple(replay.run(turns, timeline.tokens))
        finally:
            replay.close()
    return Rebase(
        point=str(where),
        num_tokens=where.num_tokens,
        policy=engine.policy_version,
        changed=changed,
        drifts=drifts,
    )


def _changed(stored: ModelIdentity, engine: Engine, adapter: str | None) -> str:
    """The first field that differs. Raises where token ids do not mean the same."""
    try:
        compare(stored, engine.identity(adapter))
    except Refused as refusal:
        field = str(getattr(refusal, "field", "")) or refusal.kind
        if field == "tokenizer":
            raise
        return field
    return ""


class _Replay:
    """A session of its own, which says what it is told to say."""

    def __init__(self, engine: Engine, adapter: str | None) -> None:
        self._engine = engine
        self._session: SessionRef = engine.open(seed=0, adapter=adapter)

    def close(self) -> None:
        self._engine.close_session(self._session)

    def run(self, turns: Sequence[AnyTurn], tokens: Sequence[int]) -> Iterator[TokenDrift]:
        pending: list[int] = []
        for turn in turns:
            if turn.kind == "prompt" or turn.logprobs is None:
                pending += tokens[turn.start : turn.end]
                continue
            for position, stored in zip(range(turn.start, turn.end), turn.logprobs, strict=True):
                yield self._step(position, tokens[position], stored, pending, turn.policy)
                pending = []

    def _step(self, position: int, token: int, stored: float, pending: list[int], policy: str) -> TokenDrift:
        done = self._decode(pending, token)
        assert done.top_logprobs is not None
        best, likeliest = max(done.top_logprobs[0], key=lambda one: one[1])
        said, now = done.token_ids[0], done.logprobs[0]
        if said != token:
            self._put_right(position, token)
            return TokenDrift(
                position=position, token_id=token, stored=stored, now=None, margin=None, best=best, policy=policy
            )
        if now >= likeliest:
            best, likeliest = token, now
        return TokenDrift(
            position=position, token_id=token, stored=stored, now=now, margin=likeliest - now, best=best,
            policy=policy,
        )  # fmt: skip

    def _decode(self, pending: Sequence[int], token: int) -> Completion:
        sampling = Sampling(
            temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=1, logit_bias=((token, FORCED),)
        )  # fmt: skip
        request = GenerateRequest(session=self._session, prompt=tuple(pending), sampling=sampling)
        return self._engine.generate([request]).result()[0]

    def _put_right(self, position: int, token: int) -> None:
        """Another token was said: continue from before it, with the right one."""
        (child,) = self._engine.fork(self._session, 1, at=position, replay=True).result()
        self._engine.close_session(self._session)
        self._session = child
        self._engine.append(child, [token]).result()
