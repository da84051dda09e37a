"""The arms that run in this process: an engine that is booted, holds the session, and has run before."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from thaw.bench.sample import Ask, Clock, Sample, children
from thaw.core.errors import NotHit
from thaw.data.files import drop_cache
from thaw.engines.base import Engine
from thaw.repo import Repository, ResolvedPoint, Session

Stock = Callable[[Sequence[int]], int]
"""The model's own prefill: token ids in, the greedy next token out."""
_READ_BYTES = 8 << 20


class Warm:
    """`live` is the session that was prefilled here; `point` is where it is stored. Sessions made are closed again."""

    def __init__(self, engine: Engine, repo: Repository, live: Session, point: ResolvedPoint, seed: int) -> None:
        self.engine, self.repo, self.point, self.seed = engine, repo, point, seed
        self._live = live
        self.tokens = live.tokens
        self.num_kv = live.num_kv
        self.packs = sorted(repo.store.packs.glob("*.safetensors"))

    def live_fork(self, ask: Ask) -> Sample:
        return children(self._live, ask, Clock(), num_wanted=self.num_kv)

    def hydrate(self, ask: Ask) -> Sample:
        clock = Clock()
        with self.repo.session(self.point) as session:
            clock.lap("hydrate")
            sample = children(session, ask, clock, num_wanted=self.num_kv)
            return _with_proof(sample, session)

    def hydrate_cold(self, ask: Ask) -> Sample:
        """As `hydrate`, after the packs were dropped from the page cache."""
        for pack in self.packs:
            drop_cache(pack)
        return self.hydrate(ask)

    def cold_read(self, ask: Ask) -> Sample:
        """What of `hydrate_cold` is reading and hashing."""
        sample = self.hydrate_cold(ask)
        return Sample(values={name: sample.values[name] for name in ("read_s", "read_nbytes")})

    def prefill(self, ask: Ask) -> Sample:
        """thaw's engine reads the tokens again, once for all children."""
        clock = Clock()
        with self.repo.session(seed=self.seed) as session:
            num_prefilled = session.append(token_ids=self.tokens).num_kv
            clock.lap("prefill")
            return children(session, ask, clock, num_wanted=0, num_prefilled=num_prefilled)

    def stock_prefill(self, stock: Stock, ask: Ask) -> Sample:
        """The model's own forward pass over tokens and one suffix, to its first token."""
        clock = Clock()
        stock((*self.tokens, *ask.suffixes[0]))
        clock.lap("prefill")
        return Sample(values={"first_token_s": clock.elapsed_s()}, stages_s=clock.stages_s)

    def plain_read(self) -> Sample:
        """The packs' bytes from a cold cache into fresh memory, with nothing but `readinto`."""
        for pack in self.packs:
            drop_cache(pack)
        clock = Clock()
        for pack in self.packs:
            _read(pack)
        return Sample(values={"read_s": clock.elapsed_s(), "read_nbytes": sum(p.stat().st_size for p in self.packs)})


def _with_proof(sample: Sample, session: Session) -> Sample:
    """The stages that the proof of the hydrate has, beside those measured from outside."""
    proof = session.proof
    if proof is None or not proof.hit:
        raise NotHit(f"the hydrate did not hit: {proof}")
    stages = {f"hydrate.{name}": seconds for name, seconds in proof.stages_s.items()}
    values = {**sample.values, "read_s": proof.stages_s.get("read", 0.0), "read_nbytes": float(proof.nbytes)}
    return Sample(values=values, stages_s={**sample.stages_s, **stages}, hits=sample.hits, outputs=sample.outputs)


def _read(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        target, at = memoryview(bytearray(os.fstat(fd).st_size)), 0
        while at < len(target):
            at += os.preadv(fd, [target[at : at + _READ_BYTES]], at)
    finally:
        os.close(fd)
