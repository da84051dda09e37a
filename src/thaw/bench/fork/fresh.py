"""The arms that run in a process of their own: `python -m thaw.bench.fork.probe`, a job on stdin, an answer in a file.

Timed from before the process is made. Options of the engine travel on stdin, so that no command line shows a path.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import msgspec

from thaw.bench.sample import Ask, Sample
from thaw.core.errors import EngineDied, TimedOut
from thaw.data.fresh_process import with_this_thaw


class FreshJob(msgspec.Struct, frozen=True, kw_only=True):
    """What a fresh process has to do: `hydrate` or `prefill` and then the children, or measure `memory`.

    `started`: the monotonic clock when the process was asked for. `lengths`: for `memory`, tokens to hydrate.
    """

    what: Literal["hydrate", "prefill", "memory"]
    engine: str
    engine_options: dict[str, object]
    repository: str
    commit: str
    tokens: tuple[int, ...] = ()
    seed: int = 0
    ask: Ask | None = None
    lengths: tuple[int, ...] = ()
    started: float = 0.0
    answer: str = ""


def run(job: FreshJob, timeout_s: float) -> Sample:
    """Run `job` in a fresh process. Raises `EngineDied` with the last lines that it wrote, `TimedOut`."""
    with tempfile.TemporaryDirectory(prefix="thaw-bench-") as folder:
        answer = Path(folder) / "answer.json"
        job = msgspec.structs.replace(job, answer=str(answer), started=time.monotonic())
        try:
            done = subprocess.run(
                [sys.executable, "-m", "thaw.bench.fork.probe"], input=msgspec.json.encode(job),
                capture_output=True, timeout=timeout_s, env=with_this_thaw(os.environ), check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise TimedOut(
                f"the fresh process ({job.what}) took over {timeout_s:g} s; allow more, or measure less"
            ) from None
        if done.returncode or not answer.exists():
            last = "\n".join(done.stderr.decode(errors="replace").strip().splitlines()[-5:])
            raise EngineDied(f"the fresh process ({job.what}) ended with code {done.returncode}: {last}")
        return msgspec.json.decode(answer.read_bytes(), type=Sample)
