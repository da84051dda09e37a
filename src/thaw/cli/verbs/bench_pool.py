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
@click.option("--only", metavar="PARTS", help="Some of round,boot,queue,pressure; default: all that the engine can.")
@click.option("--trunk-tokens", type=int, default=4096, show_default=True, metavar="N", help="The point's tokens.")
@click.option("--branches", type=numbers, default=(4, 16), show_default=True, metavar="N,N", help="Sizes of rounds.")
@click.option("--branch-tokens", type=int, default=64, show_default=True, metavar="N", help="Each branch generates.")
@click.option("--rounds", type=int, default=6, show_default=True, metavar="N", help="Each takes every arm once.")
@click.option(
    "--same-rounds",
    type=int,
    default=24,
    show_default=True,
    metavar="N",
    help="Pairs of a round in the worker that has the point and the engine's own batch.",
)
@click.option("--cold-rounds", type=int, default=1, show_default=True, metavar="N", help="Rounds from a cold boot.")
@click.option("--boot-rounds", type=int, default=3, show_default=True, metavar="N", help="boot: pairs of boots.")
@click.option("--points", type=int, default=8, show_default=True, metavar="N", help="queue: points at once.")
@click.option("--queue-branches", type=int, default=32, show_default=True, metavar="N", help="queue: of each point.")
@click.option("--queue-tokens", type=int, default=8, show_default=True, metavar="N", help="queue: each generates.")
@click.option("--queue-trunk", type=int, default=256, show_default=True, metavar="N", help="queue: a point's tokens.")
@click.option("--pressure", type=int, default=3, show_default=True, metavar="N", help="Points × their KV pool.")
@click.option("--pressure-points", type=int, default=24, show_default=True, metavar="N", help="pressure: points.")
@click.option(
    "--pressure-trunk", type=int, default=1032, show_default=True, metavar="N", help="pressure: their tokens."
)  # fmt: skip
@click.option("--pressure-branches", type=int, default=4, show_default=True, metavar="N", help="pressure: of each.")
@click.option(
    "--pressure-tokens", type=int, default=8, show_default=True, metavar="N", help="pressure: each generates."
)  # fmt: skip
@click.option(
    "--pressure-returns", type=int, default=2, show_default=True, metavar="N", help="pressure: sweeps a pass."
)  # fmt: skip
@click.option("--pressure-rounds", type=int, default=2, show_default=True, metavar="N", help="pressure: passes.")
@click.option("--max-batch", type=int, default=16, show_default=True, metavar="N", help="queue: of a worker.")
@click.option("--seed", type=int, default=7, show_default=True, metavar="N", help="The sessions' seed.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="An option of the engine's; repeatable.")
@click.option("--quick", is_flag=True, help="Take every path once, with the least of everything: not for figures.")
@click.option("--out", metavar="FILE", help="Write the receipt (JSON) there.")
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
    """Measure a pool of two workers, paired in one run: a round in the worker that has the point against the engine's
    own prefix cache, a second worker loading it from the arena against prefilling it again, and a cold boot; a pool's
    boot against the engine's own; many points at once; and more points than a worker has room for (vLLM).

    Exit code 7 when a promised check did not hold; a goal that was missed is said, and is no error.
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
