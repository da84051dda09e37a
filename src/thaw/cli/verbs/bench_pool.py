"""`thaw bench pool`: measure rounds of a pool against what the engine does by itself; the figures are a receipt."""

from __future__ import annotations

import click
import msgspec

from thaw.cli import boot, measured, options
from thaw.cli.progress import Progress
from thaw.cli.verbs.bench_vllm import numbers

EXAMPLE = """
thaw bench pool --engine vllm --model ~/models/Qwen3-0.6B --out bench-pool.json
thaw bench pool --engine transformers --only round --rounds 10
"""


@options.verb("pool", EXAMPLE)
@click.option(
    "--only", metavar="PARTS", help="Any of round,boot,queue,pressure; default: all that the engine supports."
)
@click.option("--trunk-tokens", type=int, default=4096, show_default=True, metavar="N", help="Tokens in the point.")
@click.option("--branches", type=numbers, default=(4, 16), show_default=True, metavar="N,N", help="Branches per round.")
@click.option("--branch-tokens", type=int, default=64, show_default=True, metavar="N", help="Tokens per branch.")
@click.option("--rounds", type=int, default=6, show_default=True, metavar="N", help="Each round runs every arm once.")
@click.option(
    "--same-rounds",
    type=int,
    default=24,
    show_default=True,
    metavar="N",
    help="Paired rounds: the worker that has the point, and the engine's own batch.",
)
@click.option(
    "--cold-rounds", type=int, default=1, show_default=True, metavar="N", help="Rounds that start with a cold boot."
)
@click.option("--boot-rounds", type=int, default=3, show_default=True, metavar="N", help="boot: paired boots.")
@click.option("--points", type=int, default=8, show_default=True, metavar="N", help="queue: points submitted at once.")
@click.option(
    "--queue-branches", type=int, default=32, show_default=True, metavar="N", help="queue: branches per point."
)
@click.option("--queue-tokens", type=int, default=8, show_default=True, metavar="N", help="queue: tokens per branch.")
@click.option("--queue-trunk", type=int, default=256, show_default=True, metavar="N", help="queue: tokens per point.")
@click.option(
    "--pressure",
    type=int,
    default=3,
    show_default=True,
    metavar="N",
    help="pressure: the points' KV, as a multiple of the KV pool.",
)
@click.option(
    "--pressure-points", type=int, default=24, show_default=True, metavar="N", help="pressure: number of points."
)
@click.option(
    "--pressure-trunk", type=int, default=1032, show_default=True, metavar="N", help="pressure: tokens per point."
)  # fmt: skip
@click.option(
    "--pressure-branches", type=int, default=4, show_default=True, metavar="N", help="pressure: branches per point."
)
@click.option(
    "--pressure-tokens", type=int, default=8, show_default=True, metavar="N", help="pressure: tokens per branch."
)  # fmt: skip
@click.option(
    "--pressure-returns", type=int, default=2, show_default=True, metavar="N", help="pressure: sweeps per pass."
)  # fmt: skip
@click.option(
    "--pressure-rounds", type=int, default=2, show_default=True, metavar="N", help="pressure: number of passes."
)
@click.option(
    "--max-batch", type=int, default=16, show_default=True, metavar="N", help="queue: largest batch of a worker."
)
@click.option("--seed", type=int, default=7, show_default=True, metavar="N", help="Seed of the sessions.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Set an engine option; repeatable.")
@click.option(
    "--quick", is_flag=True, help="Run every path once, at the smallest sizes: a smoke test, not a measurement."
)
@click.option("--out", metavar="FILE", help="Write the receipt (JSON) to FILE.")
@options.engine
@options.as_json
def command(
    named: str | None,
    only: str | None,
    settings: tuple[str, ...],
    quick: bool,
    out: str | None,
    engine_name: str | None,
    model: str | None,
    dtype: str | None,
    device: str | None,
    as_json: bool,
    **sizes: object,
) -> int:
    """Measure a pool of two workers against the engine alone, in one run of paired rounds.

    The parts are: round (the worker that has the point against the engine's prefix cache, another worker loading the
    point against prefilling it, and a cold boot), boot (of a pool and of the engine), queue (many points at once) and
    pressure (more points than a worker can hold; vLLM only).

    The exit code is 7 if a promised check failed. A missed goal is reported, but is not an error.
    """
    from thaw.bench.pool import PoolBenchOptions, run
    from thaw.bench.pool import quick as quick_options
    from thaw.cli.verbs.pool import engine_settings

    boot.hush()
    chosen = boot.choose_anywhere(named, engine_name, model, dtype, device)
    engine_options = {**chosen.options, **engine_settings(settings)}
    common: dict[str, object] = {"engine": chosen.name, "engine_options": engine_options}
    if only is not None:
        common["parts"] = tuple(only.split(","))
    wanted = quick_options(**common) if quick else msgspec.convert({**sizes, **common}, PoolBenchOptions)
    with Progress("measuring") as progress:
        receipt = run(wanted, progress.say)
    measured.keep(receipt, out, None)
    return measured.answer(receipt, as_json)
