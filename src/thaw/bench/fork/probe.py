"""What runs in the fresh process: boot, take the session up or read it again, fork, first tokens; or measure memory."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from thaw.bench.fork import memory
from thaw.bench.fork.fresh import FreshJob
from thaw.bench.sample import Clock, Sample, children
from thaw.engines import load_engine
from thaw.repo import Repository, open


def main() -> None:
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=FreshJob)
    clock = Clock(job.started)
    clock.lap("start")
    with load_engine(job.engine, **job.engine_options) as engine:
        clock.lap("boot")
        with open(job.repository, engine=engine, create=False) as repo:
            clock.lap("open")
            sample = _do(job, repo, clock)
    Path(job.answer).write_bytes(msgspec.json.encode(sample))


def _do(job: FreshJob, repo: Repository, clock: Clock) -> Sample:
    if job.what == "memory":
        return memory.measure(repo, job.commit, job.lengths)
    assert job.ask is not None
    if job.what == "hydrate":
        repo.engine.identity()
        clock.lap("identity")
        with repo.session(job.commit) as session:
            clock.lap("hydrate")
            return children(session, job.ask, clock, num_wanted=session.num_kv)
    with repo.session(seed=job.seed) as session:
        num_prefilled = session.append(token_ids=job.tokens).num_kv
        clock.lap("prefill")
        return children(session, job.ask, clock, num_wanted=0, num_prefilled=num_prefilled)


if __name__ == "__main__":
    main()
