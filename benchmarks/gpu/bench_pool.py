"""`thaw bench pool` with a GPU's sizes: `python bench_pool.py MODEL OUT PARTS`, with vLLM for CUDA and thaw importable.

PARTS are some of round and boot, joined by commas. A round is 4 or 16 branches of 64 tokens from a trunk of `--trunk`
tokens. With two GPUs each of the two workers has its own: the second one's round from the arena is a point that goes
from one card to the other. The receipt is rewritten after each part and after every round of boots. With `--small`
and a small model the same runs wherever vLLM does.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import msgspec
from arguments import parser

from thaw.bench.pool import PoolBenchOptions, quick, run
from thaw.receipt import Receipt, dumps

GIB = 1 << 30
ENGINE = {"kv_cache_memory_bytes": 12 * GIB, "arena_nbytes": 8 * GIB, "block_size": 16}
SIZES = {"branches": (4, 16), "branch_tokens": 64, "rounds": 6, "same_rounds": 16, "cold_rounds": 0, "boot_rounds": 3,
         "settle_s": 0.2}  # fmt: skip


def main() -> None:
    words = parser(__doc__)
    words.add_argument("--trunk", type=int, default=4001)
    words.add_argument("--cards", type=int, default=1, help="2: each worker of a round has a card of its own")
    words.add_argument("--branches", default="4,16")
    told = words.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    parts = tuple(told.parts.split(","))
    cards = told.cards > 1
    env = tuple({"CUDA_VISIBLE_DEVICES": str(card)} for card in range(2)) if cards else ()
    share = {"gpu_memory_utilization": 0.8 if cards else 0.4}
    more = "".join((f" --trunk {told.trunk}", f" --cards {told.cards}", f" --branches {told.branches}"))
    usual = {
        "parts": parts, "worker_env": env,
        "command": f"python benchmarks/gpu/bench_pool.py MODEL OUT {told.parts}{more}",
    }  # fmt: skip
    if told.small:
        small = {"enforce_eager": True, "max_model_len": 1024, "model": told.model}
        options = quick(**usual, engine_options=small, cold_rounds=0)
    else:
        branches = tuple(map(int, told.branches.split(",")))
        engine = {**ENGINE, **share, "max_model_len": told.trunk + 1024, "model": told.model}
        sizes = {**SIZES, "branches": branches, "trunk_tokens": told.trunk}
        options = msgspec.convert({**sizes, **usual, "engine_options": engine}, PoolBenchOptions)
    target = told.out / f"bench-pool-{'-'.join(parts)}-{told.trunk}{'-two-cards' if cards else ''}.json"
    began = time.monotonic()

    def keep(receipt: Receipt) -> None:
        fresh = target.with_suffix(".new")
        fresh.write_bytes(dumps(receipt))
        fresh.replace(target)

    receipt = run(options, lambda line: print(f"{time.monotonic() - began:7.1f} s  {line}", flush=True), keep)
    keep(receipt)
    for line in (*receipt.derived, *receipt.checks, *receipt.goals):
        print(msgspec.json.encode(line).decode(), flush=True)


if __name__ == "__main__":
    main()
