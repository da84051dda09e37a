"""`thaw doctor`: what works on this machine, and what a model would cost here."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thaw.cli import boot, options, output, place, view, words
from thaw.cli.progress import Progress
from thaw.core.errors import NotFound

if TYPE_CHECKING:
    from thaw.doctor import DoctorReport, Figure, ModelReport

EXAMPLE = """
thaw doctor
thaw doctor --config ~/models/Qwen3-0.6B/config.json
"""
MARKS = {
    "ok": ("ok", "green"),
    "info": ("note", "blue"),
    "warning": ("warning", "yellow"),
    "problem": ("PROBLEM", "red"),
}
PROBLEM_EXIT = 1


@options.verb("doctor", EXAMPLE)
@click.option(
    "--config",
    metavar="PATH",
    help="A config.json (supported? how large?), or a model folder, whose files are checked too.",
)
@click.option("--model", metavar="PATH", help="Load this model and measure prefill against loading.")
@click.option("--dtype", metavar="DTYPE", help="The dtype of the cache, if not the config's.")
@click.option("--quick", is_flag=True, help="Skip all measurements.")
@options.api_key
@options.as_json
def command(
    named: str | None, config: str | None, model: str | None, dtype: str | None, quick: bool, as_json: bool
) -> int:
    """Report what works here: software, engines, disk, and a model.

    For a model it reports whether it is supported, bytes of KV per token, and load time against prefill time. Without
    --config or --model it checks the model that the repository remembers. The exit code is 1 if there is a problem.
    """
    boot.hush()
    report = _examine(named, config, model, dtype, not quick)
    if as_json:
        fields = {name: getattr(report, name) for name in report.__struct_fields__}
        output.print_json({"ok": report.ok, **fields})
    else:
        _print(report)
    return 0 if report.ok else PROBLEM_EXIT


def _examine(
    named: str | None, config: str | None, model: str | None, dtype: str | None, measure: bool
) -> DoctorReport:
    from thaw.doctor import examine
    from thaw.engines.registry import DEFAULT

    repository = _repository(named)
    known = config or model or _remembered(repository)
    with contextlib.ExitStack() as stack:
        engine = None
        if model is not None:
            engine = stack.enter_context(boot.boot(boot.choose(None, DEFAULT, model, dtype)))
        progress = stack.enter_context(Progress("looking"))
        return examine(
            config=known,
            dtype=dtype,
            engine=engine,
            repository=repository or ".",
            measure=measure,
            progress=progress.say,
        )


def _repository(named: str | None) -> Path | None:
    """Where the repository is, if there is one; naming one that is not there is an error."""
    try:
        return place.find(named)
    except NotFound:
        if named is not None:
            raise
        return None


def _remembered(repository: Path | None) -> str | None:
    """The folder of the repository's model, if it remembers one that is still there."""
    if repository is None:
        return None
    with place.open_repository(str(repository)) as repo:
        chosen = repo.engine_settings()
    folder = str(chosen.options.get("model", "")) if chosen else ""
    return folder if folder and (Path(folder) / "config.json").is_file() else None


def _print(report: DoctorReport) -> None:
    for finding in report.findings:
        mark, colour = MARKS[finding.status]
        output.line(f"{output.style(mark.ljust(7), colour)}  {output.clean(finding.text)}")
        if finding.advice:
            view.block(finding.advice, indent=" " * 9)
    if report.model is not None:
        output.line()
        _model(report.model)
    if report.figures:
        output.line()
        output.rows([_figure(figure) for figure in report.figures])


def _model(model: ModelReport) -> None:
    output.line(output.style(f"{model.name} ({model.architecture}, {model.dtype})", "bold"))
    view.field("supported", "yes" if model.supported else "no: " + "; ".join(model.reasons))
    if model.kv_token_nbytes is not None:
        shape = f"{model.num_layers} layers, {model.num_kv_heads} KV heads of {model.head_dim}"
        plain = len(model.cache_groups) == 1 and model.cache_groups[0].startswith("full:")
        view.field("KV", f"{words.nbytes(model.kv_token_nbytes)} a token{f' ({shape})' if plain else ''}")
        for group in () if plain else model.cache_groups:
            view.field("cache", group)
    if model.state_nbytes is not None:
        view.field("states", f"{words.nbytes(model.state_nbytes)} at each token that a session can be forked from")
    if model.session_nbytes is not None:
        view.field("session", f"{words.nbytes(model.session_nbytes)} for {words.count(model.session_tokens, 'token')}")
    if model.max_model_len is not None:
        view.field("positions", f"{model.max_model_len:,}")


def _figure(figure: Figure) -> tuple[str, ...]:
    value = words.seconds(figure.value) if figure.unit == "s" else f"{figure.value:,.3g} {figure.unit}"
    if figure.unit == "MiB/s":
        value = f"{figure.value:,.0f} MiB/s"
    return figure.name, output.style(value, "bold"), output.style(f"{figure.basis}: {figure.text}", "dim")
