"""`thaw fsck`: check every stored byte; works on a repository that does not open."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from thaw.cli import options, output, place, view, words
from thaw.cli.progress import Progress
from thaw.core.ids import short

if TYPE_CHECKING:
    from thaw.store import FsckReport

EXAMPLE = """
thaw fsck
thaw fsck --rebuild
"""
MAX_COMMITS = 6


@options.verb("fsck", EXAMPLE)
@click.option("--rebuild", is_flag=True, help="Rebuild a lost or damaged database from the packs.")
@click.option("--quick", is_flag=True, help="Check structure and sizes only; do not hash the bytes.")
@options.as_json
def command(named: str | None, rebuild: bool, quick: bool, as_json: bool) -> int:
    """Check every stored byte and list the commits that damage affects.

    The exit code is 5 if anything is damaged."""
    report = _check(named, rebuild, quick)
    if as_json:
        output.print_json({"ok": report.ok, **dataclasses.asdict(report)})
    else:
        _print(report, rebuild)
    return report.exit_code


def _check(named: str | None, rebuild: bool, quick: bool) -> FsckReport:
    from thaw.store.checkup import fsck

    with Progress("rebuilding the database" if rebuild else "checking every stored byte"):
        return fsck(place.find(named), rebuild=rebuild, deep=not quick)


def _print(report: FsckReport, rebuild: bool) -> None:
    for problem in report.repaired:
        output.line(f"{output.style('repaired', 'green')}  {problem.file}: {problem.what}")
    for problem in report.problems:
        output.line(f"{output.style('damaged', 'bold', 'red')}   {problem.file}: {problem.what}")
        if problem.commits:
            more = len(problem.commits) - MAX_COMMITS
            listed = ", ".join(short(commit) for commit in problem.commits[:MAX_COMMITS])
            view.block(f"needed by commits {listed}{f' and {more} more' if more > 0 else ''}", indent=" " * 10)
    for text in report.notes:
        output.line(f"{output.style('note', 'dim')}      {text}")
    depth = "hashed" if report.deep else "checked"
    output.line(
        f"{words.count(report.num_packs, 'pack')}, {words.count(report.num_objects, 'object')}, "
        f"{words.count(report.num_blobs, 'blob')}, {words.count(report.num_commits, 'commit')}: "
        f"{words.nbytes(report.nbytes)} {depth} in {words.seconds(report.seconds)}"
    )
    if report.ok:
        output.line(output.style("no damage", "bold", "green") + (", database rebuilt" if report.rebuilt else ""))
    elif not rebuild:
        output.note("`thaw fsck --rebuild` restores what can be restored; `thaw log` still shows the rest.")
