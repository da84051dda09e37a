"""Hydrate in a fresh process and print what it generates: `python -m thaw.testing.resume_worker JOB.json`.

A job names an engine and rounds. A round hydrates its plans (the same plan may stand in it more than once), forks the
one session of it if `fork` says so, and generates all of them as ONE batch. The answer is JSON on standard output, log
probabilities as hexadecimal floats, so that equality is equality of bits.

`run_fresh` does all of it from the calling side.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from thaw.core.canonical import U64
from thaw.core.proof import Proof
from thaw.core.sampling import Sampling
from thaw.engines import load_engine
from thaw.engines.base import Completion, Engine, GenerateRequest, HydratePlan


class ResumeRound(msgspec.Struct, frozen=True, kw_only=True):
    """`fork` n > 0: fork the (one) hydrated session into n. `sampling` None: resume the interrupted completion."""

    plans: tuple[HydratePlan, ...]
    fork: int = 0
    prompt: tuple[int, ...] = ()
    sampling: Sampling | None = None


class ResumeJob(msgspec.Struct, frozen=True, kw_only=True):
    engine: str
    options: dict[str, str | int]
    rounds: tuple[ResumeRound, ...]


class ResumeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One completion. `logprobs` are `float.hex`."""

    token_ids: tuple[int, ...]
    logprobs: tuple[str, ...]
    text: str
    finish_reason: str | None
    num_cached_tokens: int
    num_prefilled_tokens: int
    ttft_s: float


class RoundAnswer(msgspec.Struct, frozen=True, kw_only=True):
    proofs: tuple[Proof, ...]
    completions: tuple[ResumeAnswer, ...]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`pid` proves that it was another process."""

    pid: int
    numerics: dict[str, str]
    rounds: tuple[RoundAnswer, ...]


def answer(out: Completion) -> ResumeAnswer:
    return ResumeAnswer(
        token_ids=out.token_ids,
        logprobs=tuple(value.hex() for value in out.logprobs),
        text=out.text,
        finish_reason=out.finish_reason,
        num_cached_tokens=out.usage.num_cached_tokens,
        num_prefilled_tokens=out.usage.num_prefilled_tokens,
        ttft_s=out.ttft_s,
    )


def run_fresh(job: ResumeJob, folder: Path, *, timeout_s: float = 600.0) -> Report:
    """Run `job` in a fresh interpreter. `folder` takes the job file."""
    path = folder / "job.json"
    path.write_bytes(msgspec.json.encode(job, enc_hook=_enc_hook))
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(path)], capture_output=True, timeout=timeout_s, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the worker ended with {done.returncode}:\n{done.stderr.decode(errors='replace')[-4000:]}")
    return msgspec.json.decode(done.stdout, type=Report)


def run(job: ResumeJob) -> Report:
    """Run `job` in this process."""
    with load_engine(job.engine, **job.options) as engine:
        rounds = tuple(_round(engine, one) for one in job.rounds)
        return Report(pid=os.getpid(), numerics=engine.info.numerics, rounds=rounds)


def _round(engine: Engine, asked: ResumeRound) -> RoundAnswer:
    hydrated = [engine.hydrate(plan).result() for plan in asked.plans]
    sessions = [one.session for one in hydrated]
    if asked.fork:
        sessions = engine.fork(sessions[0], asked.fork).result()
    resume = asked.sampling is None
    requests = [
        GenerateRequest(session=s, prompt=asked.prompt, sampling=asked.sampling, resume=resume) for s in sessions
    ]
    outs = engine.generate(requests).result()
    for session in (*sessions, *(one.session for one in hydrated)):
        engine.close_session(session)
    return RoundAnswer(proofs=tuple(one.proof for one in hydrated), completions=tuple(map(answer, outs)))


def _enc_hook(value: Any) -> Any:
    """Paths and 64-bit integers travel as strings."""
    return str(int(value) if isinstance(value, U64) else value)


def _dec_hook(kind: type, value: Any) -> Any:
    return U64(int(value)) if kind is U64 else Path(value)


def main(path: str) -> None:
    job = msgspec.json.decode(Path(path).read_bytes(), type=ResumeJob, dec_hook=_dec_hook)
    sys.stdout.buffer.write(msgspec.json.encode(run(job), enc_hook=_enc_hook))


if __name__ == "__main__":
    main(sys.argv[1])
