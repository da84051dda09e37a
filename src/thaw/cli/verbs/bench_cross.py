"""`thaw bench cross`: one session through several engines; what stays equal, and what the numbers do, is a receipt."""

from __future__ import annotations

import click

from thaw.cli import boot, measured, options
from thaw.cli.progress import Progress
from thaw.core.errors import InvalidRequest

EXAMPLE = """
thaw bench cross --model ~/models/SmolLM2-135M-Instruct --out cross-engines.json
thaw bench cross --route transformers,sglang --python sglang=.venv-sglang/bin/python
"""
MAX_MODEL_LEN = 4096
"""Enough for what is measured, of an engine with a server: it would make room for the model's whole length."""


@options.verb("cross", EXAMPLE)
@click.option("--route", default="transformers,vllm,sglang,transformers", show_default=True, metavar="NAME,NAME")
@click.option(
    "--python",
    "pythons",
    multiple=True,
    metavar="NAME=PATH",
    help="The Python interpreter with this engine; repeatable.",
)
@click.option(
    "--tokens", "num_tokens", type=int, default=900, show_default=True, metavar="N", help="Tokens in the document."
)
@click.option("--points", type=int, default=8, show_default=True, metavar="N", help="Number of points to compare at.")
@click.option("--out", metavar="FILE", help="Write the receipt (JSON) to FILE.")
@options.engine
@options.as_json
def command(
    named: str | None,
    route: str,
    pythons: tuple[str, ...],
    num_tokens: int,
    points: int,
    out: str | None,
    engine_name: str | None,
    model: str | None,
    dtype: str | None,
    device: str | None,
    as_json: bool,
) -> int:
    """Pass one session through several engines and compare bytes, cache hits and log probabilities.

    Each engine runs in its own environment and continues from the previous engine's commit. The receiver must count
    all KV as cached, and KV captured from it again must be the same bytes. Log probabilities are shown next to the
    receiver's own noise. The exit code is 7 if a promised check failed.
    """
    from pathlib import Path

    from thaw.bench.cross import CrossBenchOptions, run
    from thaw.engines.registry import DEFAULT, kinds

    boot.hush()
    if engine_name is not None or device is not None:
        raise InvalidRequest("bench cross loads the engines in --route: leave out --engine and --device")
    chosen = boot.choose_anywhere(named, DEFAULT, model)
    served = [kind for kind in kinds() if kind.server is not None]
    found = {kind.name: python for kind in served if Path(python := f".venv-{kind.name}/bin/python").exists()}
    wanted = CrossBenchOptions(
        model=str(chosen.options["model"]),
        route=tuple(route.split(",")),
        pythons=found | _pairs(pythons),
        engine_options={kind.name: {**kind.modest, "max_model_len": MAX_MODEL_LEN} for kind in served},
        num_tokens=num_tokens,
        points=points,
        dtype=dtype or "",
    )
    with Progress("crossing") as progress:
        receipt = run(wanted, progress.say)
    measured.keep(receipt, out, None)
    return measured.answer(receipt, as_json)


def _pairs(given: tuple[str, ...]) -> dict[str, str]:
    """NAME=PATH, several times."""
    split = [pair.partition("=") for pair in given]
    wrong = [name for name, equals, path in split if not (name and equals and path)]
    if wrong:
        raise InvalidRequest(f"--python {wrong[0]}: write NAME=PATH, for example vllm=.venv-vllm/bin/python")
    return {name: path for name, _, path in split}
