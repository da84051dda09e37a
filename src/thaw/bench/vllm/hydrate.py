"""A session goes on in a process that never saw it: hydrate of its commit, against prefilling its tokens again.

One engine reads the sessions, commits them and ends. Another one is booted and measured; `live` is what the first
engine took for a child of the session that it held.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from thaw.bench.rounds import Rounds
from thaw.bench.sample import Ask, Clock, Sample, children
from thaw.bench.vllm.arms import Document, Tokens, fresh_salt, plain_children
from thaw.bench.vllm.options import Options
from thaw.core.errors import NotHit
from thaw.repo import Repository, Session

if TYPE_CHECKING:
    from thaw.bench.vllm.plain import Plain


class Stored:
    """A session of `tokens` that was committed; `num_kv` of them have KV in the commit."""

    def __init__(self, tokens: Tokens, commit: str, num_kv: int) -> None:
        self.tokens, self.commit, self.num_kv = tokens, commit, num_kv


def store(rounds: Rounds, options: Options, repo: Repository, document: Document) -> list[Stored]:
    """In the first engine: read every session, commit it, and measure a child of the live one."""
    out = []
    ask = _ask(document)
    for length in options.lengths:
        rounds.progress(f"reading {length} tokens once")
        with repo.session(seed=options.seed) as live:
            live.append(token_ids=document.session(length))
            commit = live.commit("a session that another process goes on from", branch=f"trunk-{length}").commit
            out.append(Stored(live.tokens, commit, live.num_kv))
            fork = partial(live_child, live, ask)
            rounds.alternate(options.hydrate_rounds, {f"live.{length}": fork})
    return out


def live_child(live: Session, ask: Ask) -> Sample:
    """A child of a session that the engine holds."""
    return children(live, ask, Clock(), num_wanted=live.num_kv)


def measure(
    rounds: Rounds, options: Options, repo: Repository, plain: Plain, document: Document, stored: list[Stored]
) -> None:
    """In the second engine: the two arms in turn, length by length."""
    ask = _ask(document)
    for session in stored:
        length = len(session.tokens)
        rounds.alternate(
            options.hydrate_rounds,
            {
                f"hydrate.{length}": partial(hydrate, repo, session, ask),
                f"prefill.{length}": partial(prefill, plain, session, ask),
            },
        )


def hydrate(repo: Repository, stored: Stored, ask: Ask) -> Sample:
    """Load the commit, then a child of it. Raises `NotHit` where some of it was prefilled again."""
    clock = Clock()
    with repo.session(stored.commit) as session:
        clock.lap("hydrate")
        sample = children(session, ask, clock, num_wanted=stored.num_kv)
        proof = session.proof
    if proof is None or not proof.hit:
        raise NotHit(f"the hydrate did not hit: {proof}")
    stages = {f"hydrate.{name}": seconds for name, seconds in proof.stages_s.items()}
    values = {**sample.values, "nbytes": float(proof.nbytes)}
    return Sample(values=values, stages_s={**sample.stages_s, **stages}, hits=sample.hits, outputs=sample.outputs)


def prefill(plain: Plain, stored: Stored, ask: Ask) -> Sample:
    """The same tokens as a plain request, with nothing cached."""
    return plain_children(plain, stored.tokens, fresh_salt(), ask, num_wanted=0)


def _ask(document: Document) -> Ask:
    return Ask(n=1, suffixes=document.suffixes(1), max_tokens=1, temperature=0.0)
