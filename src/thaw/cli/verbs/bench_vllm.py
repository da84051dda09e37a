"""`thaw bench vllm`: measure thaw in vLLM against vLLM alone; the figures are a receipt."""

from __future__ import annotations

from collections.abc import Callable

import click
import msgspec

from thaw.cli import boot, measured, options
from thaw.cli.progress import Progress
from thaw.core.errors import InvalidRequest

EXAMPLE = """
thaw bench vllm --model ~/models/Qwen3-0.6B --out bench-vllm.json
thaw bench vllm --only fork,idle --rounds 20
"""


def numbers(value: str | tuple[int, ...]) -> tuple[int, ...]:
    """1000,2000: whole numbers."""
    if isinstance(value, tuple):
        return value
    try:
        return tuple(int(word) for word in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers like 1000,2000") from None


def _several(function: Callable[..., object]) -> Callable[..., object]:
    """Sizes of `thaw bench vllm`; the defaults are those of its `Options`."""
    for names, kind, default, text in reversed(SIZES):
        function = click.option(
            *names,
            type=kind,
            default=default,
            show_default=True,
            metavar="N,N" if isinstance(default, tuple) else "N",
            help=text,
        )(function)
    return function


SIZES: tuple[tuple[tuple[str, ...], object, object, str], ...] = (
    (("--block-size",), int, 128, "Tokens per block; vLLM's defaults are 128 on a CPU, 16 on a GPU."),
    (("--lengths",), numbers, (1000, 2000, 4000, 7500), "hydrate: tokens per session."),
    (("--hydrate-rounds",), int, 5, "hydrate: rounds per length."),
    (("--fork-tokens",), int, 1024, "fork: tokens in the session."),
    (("--children",), numbers, (4, 16), "fork: children per group."),
    (("--child-tokens",), int, 64, "fork: tokens per child."),
    (("--rounds",), int, 10, "fork: each round runs every arm once."),
    (("--trees",), int, 24, "pressure: number of sessions."),
    (("--tree-tokens",), int, 1000, "pressure: tokens per session."),
    (("--branches",), int, 4, "pressure: children per visit."),
    (("--branch-tokens",), int, 16, "pressure: tokens per child."),
    (("--returns",), int, 2, "pressure: visits after the first one."),
    (("--pressure",), int, 3, "pressure: the sessions' KV, as a multiple of the engine's blocks."),
    (("--pressure-rounds",), int, 1, "pressure: each round runs both arms once."),
    (("--offload-gib",), int, 0, "pressure: host memory for a third arm, vLLM's offload tier (GPU only)."),
    (("--idle-requests",), int, 16, "idle: plain requests per batch."),
    (("--idle-prompt",), int, 128, "idle: prompt tokens per request."),
    (("--idle-tokens",), int, 64, "idle: generated tokens per request."),
    (("--idle-rounds",), int, 4, "idle: batches per engine and boot."),
    (("--idle-boots",), int, 6, "idle: number of boots of both engines."),
    (("--first-boot",), int, 0, "idle: number of the first boot, if others are measured separately."),
    (("--copy-rounds",), int, 8, "dma: rounds per length."),
    (("--first-children",), numbers, (1, 4), "first: children per group."),
    (("--first-rounds",), int, 8, "first: rounds per length and group."),
    (("--gap-tokens",), int, 1000, "gap: tokens in the session."),
    (("--gap-others",), int, 8, "gap: plain requests that decode at the same time."),
    (("--gap-prompt",), int, 64, "gap: prompt tokens per request."),
    (("--gap-steps",), int, 64, "gap: fewest tokens per request."),
    (("--gap-most",), int, 1024, "gap: most tokens per request."),
    (("--gap-rounds",), int, 5, "gap: each round runs every arm once."),
    (("--seed",), int, 7, "Seed of the sessions."),
)


@options.verb("vllm", EXAMPLE)
@click.option("--only", metavar="PARTS", help="Any of hydrate,fork,pressure,idle (the default), dma,first,gap.")
@_several
@click.option("--compile", "compiled", is_flag=True, help="Let vLLM compile the model first (minutes on a CPU).")
@click.option("--quick", is_flag=True, help="Run every path once, in a minute or two: a smoke test, not a measurement.")
@click.option("--out", metavar="FILE", help="Write the receipt (JSON) to FILE.")
@options.engine
@options.as_json
def command(
    named: str | None,
    only: str | None,
    compiled: bool,
    quick: bool,
    out: str | None,
    engine_name: str | None,
    model: str | None,
    dtype: str | None,
    device: str | None,
    as_json: bool,
    **sizes: object,
) -> int:
    """Measure thaw in vLLM against vLLM alone, in one run.

    The default parts are: hydrate (in another process, against prefilling again), fork (against the prefix cache),
    pressure (returning to more sessions than there are blocks for) and idle (the cost of the connector when unused).

    The parts to ask for are: dma (copies, against the bus), first (first tokens of children that must be loaded) and
    gap (how captures and hydrates delay other requests).

    Boots vLLM about fifteen times, at most two at once. The exit code is 7 if a promised check failed. A missed goal is
    reported, but is not an error.
    """
    from thaw.bench.vllm import Options, run
    from thaw.bench.vllm import quick as quick_options

    boot.hush()
    if engine_name not in (None, "vllm") or device is not None:
        raise InvalidRequest(
            "bench vllm boots vLLM on the device that it was built for: leave out --engine and --device"
        )
    chosen = boot.choose_anywhere(named, "vllm", model, dtype, None)
    common: dict[str, object] = {"engine_options": chosen.options, "eager": not compiled}
    if only is not None:
        common["parts"] = tuple(only.split(","))
    wanted = quick_options(**common) if quick else msgspec.convert({**sizes, **common}, Options)
    with Progress("measuring") as progress:
        receipt = run(wanted, progress.say)
    measured.keep(receipt, out, None)
    return measured.answer(receipt, as_json)
