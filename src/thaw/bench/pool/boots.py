"""Booting: a pool of one worker against the engine's own boot, each in processes of their own; and a cold round."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from thaw.bench.pool import arms, inside
from thaw.bench.sample import Sample
from thaw.core.errors import EngineDied
from thaw.engines import load_engine
from thaw.pool import ForkPool

LIMIT_S = 1800.0


def of_pool(engine: str, options: dict[str, Any], look: Callable[[ForkPool], None]) -> Sample:
    """From the call until a pool of one worker can take a round. `look` at it comes after that."""
    began = time.monotonic()
    with ForkPool(engine, workers=1, **options) as pool:
        seconds = time.monotonic() - began
        look(pool)
    return Sample(values={"boot_s": seconds})


def of_engine(engine: str, options: dict[str, Any]) -> Sample:
    """The same engine in a fresh process, from the process' start until it is loaded. No pool, no socket."""
    found = _fresh({"engine": engine, "options": options})
    return Sample(values={"boot_s": found["boot_s"]})


def cold(
    engine: str, options: dict[str, Any], trunk: Sequence[int], suffixes: Sequence[Sequence[int]], max_tokens: int
) -> Sample:
    """Boot, prefill, and the branches: what a round costs where nothing runs yet."""
    job = {
        "engine": engine, "options": options, "trunk": list(trunk), "suffixes": [list(ids) for ids in suffixes],
        "max_tokens": max_tokens,
    }  # fmt: skip
    found = _fresh(job)
    sample = arms.as_sample(found["round"])
    values = {name: value + found["boot_s"] for name, value in sample.values.items()}
    return Sample(
        values=values, stages_s={"boot": found["boot_s"], **sample.stages_s}, hits=sample.hits, outputs=sample.outputs
    )


def _fresh(job: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps({**job, "began": began}), capture_output=True, text=True,
        timeout=LIMIT_S,
    )  # fmt: skip
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise EngineDied(f"the fresh process ended with {done.returncode}: {done.stderr[-500:]}")


def main() -> None:
    """Boot what standard input names, and do its round if it has one. The clock is the machine's."""
    job = json.loads(sys.stdin.read())
    with load_engine(job["engine"], **job["options"]) as engine:
        answer: dict[str, Any] = {"boot_s": time.monotonic() - job["began"]}
        if "trunk" in job:
            answer["round"] = inside.again(
                engine, trunk=job["trunk"], suffixes=job["suffixes"], max_tokens=job["max_tokens"]
            )
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
