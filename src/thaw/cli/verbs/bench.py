"""`thaw bench fork`, `vllm`, `pool` and `cross`: measure thaw against doing without it; the figures are a receipt."""

from __future__ import annotations

import click

from thaw.cli import boot, measured, options, prompts
from thaw.cli.progress import Progress
from thaw.cli.verbs import bench_cross, bench_pool, bench_vllm

EXAMPLE = """
thaw bench fork --model ~/models/Qwen3-0.6B --out bench.json --svg bench.svg
"""


@click.group("bench", epilog=f"\b\nExample:\n  {EXAMPLE.strip()}")
def command() -> None:
    """Measure thaw against the same work without it."""


@options.verb("fork", EXAMPLE)
@click.option("--tokens", "num_tokens", type=int, default=3500, show_default=True, metavar="N", help="Session length.")
@click.option("--children", type=int, default=4, show_default=True, metavar="N")
@click.option("--child-tokens", type=int, default=16, show_default=True, metavar="N")
@click.option("--rounds", type=int, default=5, show_default=True, metavar="N", help="Each round runs every arm once.")
@click.option("--fresh-rounds", type=int, default=3, show_default=True, metavar="N", help="Rounds in fresh processes.")
@click.option("--document", metavar="FILE", help="The session's text; default: generated sentences.")
@click.option("--quick", is_flag=True, help="Run every path once, in seconds: a smoke test, not a measurement.")
@click.option("--out", metavar="FILE", help="Write the receipt (JSON) to FILE.")
@click.option("--svg", metavar="FILE", help="Write a chart to FILE.")
@options.engine
@options.as_json
def fork(
    named: str | None,
    num_tokens: int,
    children: int,
    child_tokens: int,
    rounds: int,
    fresh_rounds: int,
    document: str | None,
    quick: bool,
    out: str | None,
    svg: str | None,
    engine_name: str | None,
    model: str | None,
    dtype: str | None,
    device: str | None,
    as_json: bool,
) -> int:
    """Measure live fork, hydrate (warm and fresh), prefilling again and cold start, in one run of paired rounds.

    Uses the repository's model unless --model names one. The exit code is 7 if a promised check
    failed. A missed goal is reported, but is not an error.
    """
    from thaw.bench.fork import ForkBenchOptions, run
    from thaw.bench.fork import quick as quick_options

    boot.hush()
    chosen = boot.choose_anywhere(named, engine_name, model, dtype, device)
    text = prompts.from_file(document) if document else None
    common = {"engine_options": chosen.options, "document": text}
    if quick:
        wanted = quick_options(chosen.name, **common)
    else:
        wanted = ForkBenchOptions(
            engine=chosen.name,
            engine_options=chosen.options,
            document=text,
            num_tokens=num_tokens,
            children=children,
            child_tokens=child_tokens,
            rounds=rounds,
            fresh_rounds=min(fresh_rounds, rounds),
        )
    with Progress("measuring") as progress:
        receipt = run(wanted, progress.say)
    measured.keep(receipt, out, svg)
    return measured.answer(receipt, as_json)


command.add_command(fork)
command.add_command(bench_vllm.command)
command.add_command(bench_cross.command)
command.add_command(bench_pool.command)
