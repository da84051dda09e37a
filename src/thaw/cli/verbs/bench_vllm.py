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
    (("--block-size",), int, 128, "Tokens a block: 128 is vLLM's own on a CPU, 16 on a GPU."),
    (("--lengths",), numbers, (1000, 2000, 4000, 7500), "hydrate: sessions' tokens."),
    (("--hydrate-rounds",), int, 5, "hydrate: rounds for each length."),
    (("--fork-tokens",), int, 1024, "fork: the session's tokens."),
    (("--children",), numbers, (4, 16), "fork: sizes of the groups."),
    (("--child-tokens",), int, 64, "fork: tokens each child generates."),
    (("--rounds",), int, 10, "fork: each takes every arm once."),
    (("--trees",), int, 24, "pressure: sessions."),
    (("--tree-tokens",), int, 1000, "pressure: each session's tokens."),
    (("--branches",), int, 4, "pressure: children of a visit."),
    (("--branch-tokens",), int, 16, "pressure: tokens each child generates."),
    (("--returns",), int, 2, "pressure: visits after the first."),
    (("--pressure",), int, 3, "pressure: the sessions' KV, in blocks of the engine."),
    (("--pressure-rounds",), int, 1, "pressure: each takes both arms once."),
    (("--offload-gib",), int, 0, "pressure: host memory of a third arm, vLLM's offload tier (GPU only)."),
    (("--idle-requests",), int, 16, "idle: plain requests of a batch."),
    (("--idle-prompt",), int, 128, "idle: their tokens."),
    (("--idle-tokens",), int, 64, "idle: tokens they generate."),
    (("--idle-rounds",), int, 4, "idle: batches in each engine of a boot."),
    (("--idle-boots",), int, 6, "idle: boots of both engines."),
    (("--first-boot",), int, 0, "idle: number of the first boot, where the others are measured apart."),
    (("--copy-rounds",), int, 8, "dma: rounds for each length."),
    (("--first-children",), numbers, (1, 4), "first: sizes of the groups."),
    (("--first-rounds",), int, 8, "first: rounds for each length and group."),
    (("--gap-tokens",), int, 1000, "gap: the session's tokens."),
    (("--gap-others",), int, 8, "gap: plain requests that decode meanwhile."),
    (("--gap-prompt",), int, 64, "gap: their tokens."),
    (("--gap-steps",), int, 64, "gap: tokens that each of them generates at least."),
    (("--gap-most",), int, 1024, "gap: tokens that each of them generates at most."),
    (("--gap-rounds",), int, 5, "gap: each takes every arm once."),
    (("--seed",), int, 7, "The sessions' seed."),
)


@options.verb("vllm", EXAMPLE)
@click.option("--only", metavar="PARTS", help="Some of hydrate,fork,pressure,idle (default: all four), dma,first,gap.")
@_several
@click.option("--compile", "compiled", is_flag=True, help="Let vLLM compile the model first (minutes on a CPU).")
@click.option("--quick", is_flag=True, help="Take every path once, in a minute or two: not for figures.")
@click.option("--out", metavar="FILE", help="Write the receipt (JSON) there.")
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
    """Measure thaw in vLLM against vLLM alone, in one run: hydrate in another process against prefilling again, forks
    against the prefix cache, returns to more sessions than there are blocks for, and what the idle connector costs.

    Where they are asked for: dma, copies alone against the bus; first, first tokens of children that must be loaded;
    gap, what others that decode feel of captures and hydrates.

    Boots vLLM some fifteen times, two side by side at most. Exit code 7 when a promised check did not hold; a goal that
    was missed is said, and is no error.
    """
    from thaw.bench.vllm import Options, run
    from thaw.bench.vllm import quick as quick_options

    boot.hush()
    if engine_name not in (None, "vllm") or device is not None:
        raise InvalidRequest("bench vllm boots vLLM, on the device that it was built for: leave out --engine, --device")
    chosen = boot.choose_anywhere(named, "vllm", model, dtype, None)
    common: dict[str, object] = {"engine_options": chosen.options, "eager": not compiled}
    if only is not None:
        common["parts"] = tuple(only.split(","))
    wanted = quick_options(**common) if quick else msgspec.convert({**sizes, **common}, Options)
    with Progress("measuring") as progress:
        receipt = run(wanted, progress.say)
    measured.keep(receipt, out, None)
    return measured.answer(receipt, as_json)
