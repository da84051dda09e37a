"""`thaw bench vllm` with a GPU's sizes: `python bench.py MODEL OUT PARTS`, with vLLM for CUDA and thaw importable.

PARTS are some of pressure, hydrate, fork, dma, first, gap and idle, joined by commas; each takes one to five minutes on
an H100 or H200, and together they share their engines. The receipt in the folder OUT is rewritten whenever a part is
done, so a run that was cut off keeps what it measured. Every boot of idle is a process of its own and has a receipt of
its own: the same command goes on after those that are there. With `--small` and a small model the same runs wherever
vLLM does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from arguments import parser, with_readers

from thaw.bench.vllm import Options, quick, run
from thaw.bench.vllm.report import joined
from thaw.receipt import Receipt, dumps, read

GIB = 1 << 30
ENGINE = {"gpu_memory_utilization": 0.85, "kv_cache_memory_bytes": 20 * GIB, "arena_nbytes": 32 * GIB}
TWO_ENGINES = {
    "gpu_memory_utilization": 0.45, "kv_cache_memory_bytes": 8 * GIB, "arena_nbytes": 8 * GIB, "max_model_len": 4096,
}  # fmt: skip
"""idle has an engine with and one without thaw side by side."""
SETTLE_S = 0.3
"""A GPU's engine does not leave threads spinning on the host's cores."""
SIZES: dict[str, dict[str, object]] = {
    "pressure": {"trees": 12, "tree_tokens": 16004, "branches": 8, "branch_tokens": 64, "offload_gib": 30},
    "hydrate": {"lengths": (4000, 16000, 60000), "hydrate_rounds": 5},
    "fork": {"fork_tokens": 4096, "children": (4, 16, 64), "child_tokens": 64, "rounds": 5},
    "idle": {"idle_requests": 32, "idle_prompt": 512, "idle_tokens": 128, "idle_rounds": 12, "idle_boots": 3},
    "dma": {"lengths": (4000, 16000), "copy_rounds": 6},
    "first": {"lengths": (4000, 16000), "first_children": (1, 4), "first_rounds": 8},
    "gap": {
        "gap_tokens": 16000, "gap_others": 32, "gap_prompt": 64, "gap_steps": 128, "gap_most": 2048, "gap_rounds": 5,
    },
}  # fmt: skip


def main() -> None:
    words = with_readers(parser(__doc__))
    words.add_argument("--children", help="sizes of forks, joined by commas")
    words.add_argument("--rounds", type=int, help="of each fork")
    words.add_argument("--boot", type=int, help="of idle: that one alone")
    words.add_argument("--boots", type=int, help="of idle, in all")
    told = words.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    parts = told.parts.split(",")
    others = [part for part in parts if part != "idle"]
    if told.boot is not None:
        _measure(told, ("idle",), _boot_file(told, told.boot))
    if others:
        _measure(told, tuple(others), told.out / f"bench-gpu-{'-'.join(others)}.json")
    if "idle" in parts and told.boot is None:
        _boots(told, told.out / "bench-gpu-idle.json")


def _measure(told: argparse.Namespace, parts: tuple[str, ...], target: Path) -> None:
    """The parts in this process; `target` is there once all of them, or as many as there was time for, are measured."""
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {line}", flush=True)

    _keep(run(_options(told, parts), say, lambda receipt: _write(receipt, target)), target)


def _boots(told: argparse.Namespace, target: Path) -> None:
    """Every boot of idle that has no receipt yet, and one receipt of all."""
    count = told.boots or (1 if told.small else SIZES["idle"]["idle_boots"])
    for boot in range(count):
        if not _boot_file(told, boot).exists():
            again = [sys.executable, __file__, told.model, str(told.out), "idle", "--boot", str(boot)]
            again += ["--readers", str(told.readers), *(["--small"] if told.small else [])]
            subprocess.run(again, check=True)
        done = [read(_boot_file(told, number)) for number in range(boot + 1)]
        _write(joined(done, command="make bench-gpu PARTS=idle"), target)
    _keep(read(target), target)


def _boot_file(told: argparse.Namespace, boot: int) -> Path:
    return told.out / f"idle-boot-{boot}.json"


def _write(receipt: Receipt, target: Path) -> None:
    """Whole or not at all."""
    fresh = target.with_suffix(".new")
    fresh.write_bytes(dumps(receipt))
    fresh.replace(target)


def _keep(receipt: Receipt, target: Path) -> None:
    _write(receipt, target)
    for line in (*receipt.derived, *receipt.checks, *receipt.goals):
        print(msgspec.json.encode(line).decode(), flush=True)


def _options(told: argparse.Namespace, parts: tuple[str, ...]) -> Options:
    asked = {name: value for name in ("children", "rounds") if (value := getattr(told, name))}
    more = "".join(f" {name.upper()}={value}" for name, value in asked.items())
    more += f" READERS={told.readers}" if told.readers else ""
    if told.children:
        asked["children"] = tuple(map(int, told.children.split(",")))
    common = {**asked, "parts": parts, "folder": told.out, "command": f"make bench-gpu PARTS={','.join(parts)}{more}"}
    if told.boot is not None:
        common |= {"first_boot": told.boot, "idle_boots": 1}
    usual = {"model": told.model, **({"readers": told.readers} if told.readers else {})}
    if told.small:
        return quick(**common, engine_options={**usual, "max_model_len": 1024})
    sizes = {name: value for part in parts for name, value in SIZES[part].items()}
    engine = {**usual, **(TWO_ENGINES if "idle" in parts else ENGINE)}
    on_gpu = {"block_size": 16, "eager": False, "settle_s": SETTLE_S, "engine_options": engine}
    return msgspec.convert({**sizes, **common, **on_gpu}, Options)


if __name__ == "__main__":
    main()
