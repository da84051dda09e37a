"""`thaw bench vllm` with a GPU's sizes: `python bench.py MODEL OUT PARTS`, with vLLM for CUDA and thaw importable.

PARTS are some of pressure, hydrate, fork and idle, joined by commas; each takes one to five minutes on an H100 or H200,
and together they share their engines. The receipt in the folder OUT is written anew whenever an engine has done its
part, so a run that was cut off keeps what it measured. With `--small` and a small model the same runs wherever vLLM
does.
"""

from __future__ import annotations

import argparse
import time

import msgspec
from arguments import parser

from thaw.bench.vllm import Options, run
from thaw.receipt import Receipt, dumps

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
}


def main() -> None:
    words = parser(__doc__)
    words.add_argument("--children", help="sizes of forks, joined by commas")
    words.add_argument("--rounds", type=int, help="of each fork")
    told = words.parse_args()
    target = told.out / f"bench-gpu-{told.parts.replace(',', '-')}.json"
    told.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def keep(receipt: Receipt) -> None:
        target.write_bytes(dumps(receipt))

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {line}", flush=True)

    receipt = run(_options(told), say, keep)
    keep(receipt)
    for line in (*receipt.derived, *receipt.checks, *receipt.goals):
        print(msgspec.json.encode(line).decode(), flush=True)


def _options(told: argparse.Namespace) -> Options:
    parts = tuple(told.parts.split(","))
    asked = {name: value for name in ("children", "rounds") if (value := getattr(told, name))}
    more = "".join(f" {name.upper()}={value}" for name, value in asked.items())
    if told.children:
        asked["children"] = tuple(map(int, told.children.split(",")))
    common = {**asked, "parts": parts, "folder": told.out, "command": f"make bench-gpu PARTS={told.parts}{more}"}
    if told.small:
        return msgspec.convert({**common, "goals": False, "engine_options": {"model": told.model}}, Options)
    sizes = {name: value for part in parts for name, value in SIZES[part].items()}
    engine = {"model": told.model, **(TWO_ENGINES if "idle" in parts else ENGINE)}
    on_gpu = {"block_size": 16, "eager": False, "settle_s": SETTLE_S, "engine_options": engine}
    return msgspec.convert({**sizes, **common, **on_gpu}, Options)


if __name__ == "__main__":
    main()
