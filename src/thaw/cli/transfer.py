"""What push, fetch, pull and clone share on the command line: options of an address, progress, and the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from thaw.cli import output, words
from thaw.cli.progress import Progress
from thaw.core.ids import short
from thaw.remote.meter import TransferMeter
from thaw.remote.report import RefMoved, TransferReport

SAID = {
    "new": "new",
    "moved": "forward",
    "forced": "replaced",
    "deleted": "deleted",
    "up-to-date": "up to date",
    "kept": "kept: that name is another commit's here",
    "ahead": "ahead of the remote",
    "left-out": "left out: the name has no place here",
}

option = click.option(
    "-o", "--option", "pairs", multiple=True, metavar="KEY=VALUE",
    help="How the remote is reached: endpoint, region, path_style, profile, …; repeatable. Never a credential.",
)  # fmt: skip


def read_options(pairs: tuple[str, ...]) -> dict[str, str | int | bool]:
    """KEY=VALUE pairs: `true`, `false` and whole numbers are what they look like."""
    found: dict[str, str | int | bool] = {}
    for pair in pairs:
        key, there, value = pair.partition("=")
        if not there or not key:
            raise click.BadParameter(f"{pair[:80]!r} is not KEY=VALUE", param_hint="-o")
        found[key] = {"true": True, "false": False}.get(value, int(value) if value.isdecimal() else value)
    return found


def watched(what: str, do: Callable[[TransferMeter], Any]) -> Any:
    """`do`, with its progress on stderr."""
    meter = TransferMeter()
    with Progress(what, lambda: how_far(meter)):
        return do(meter)


def how_far(meter: TransferMeter) -> str:
    if not meter.nbytes and not meter.total_nbytes:
        return meter.step
    done, total = words.nbytes(meter.nbytes), words.nbytes(max(meter.nbytes, meter.total_nbytes))
    return f"{meter.step}: {done} of {total}, {words.nbytes(int(meter.bytes_per_s))}/s"


def say(report: TransferReport, verb: str, as_json: bool) -> None:
    """The report: a line for each ref that changed, then what was moved and how fast."""
    if as_json:
        output.print_json(report)
        return
    changed = [ref for ref in report.refs if ref.outcome != "up-to-date"]
    output.rows([_row(ref) for ref in changed])
    if not changed:
        what = "no branch moved" if report.num_commits else "up to date"
        output.line(f"{report.remote} ({report.url}): {what}")
    if report.nbytes:
        rate = words.nbytes(int(report.nbytes / max(report.seconds, 1e-9)))
        output.note(
            f"{verb} {words.count(report.num_commits, 'commit')}, {words.nbytes(report.nbytes)} "
            f"({words.nbytes(report.blob_nbytes)} KV) in {words.seconds(report.seconds)}, {rate}/s"
        )
    if report.num_skipped_packs:
        output.note(f"{words.count(report.num_skipped_packs, 'pack')} had been sent before")


def _row(ref: RefMoved) -> tuple[str, ...]:
    old, new = ("–" if commit is None else short(commit) for commit in (ref.old, ref.new))
    name = ref.name if ref.kind == "branch" else f"tag {ref.name}"
    return f"  {output.style(name, 'bold', 'green')}", f"{old} → {new}", SAID[ref.outcome]
