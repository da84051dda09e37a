"""`thaw gc`: delete what nothing refers to."""

from __future__ import annotations

import dataclasses

import click

from thaw.cli import options, output, words
from thaw.cli.place import open_repository
from thaw.cli.progress import Progress

MAX_DAYS = 100_000
EXAMPLE = """
thaw gc --dry-run
thaw gc --keep-days 7
"""


@options.verb("gc", EXAMPLE)
@click.option("--dry-run", is_flag=True, help="Report what would be deleted; delete nothing.")
@click.option("--keep-days", type=options.Number(0, MAX_DAYS), metavar="D", help="Keep reflog entries for D days (90).")
@options.as_json
def command(named: str | None, dry_run: bool, keep_days: float | None, as_json: bool) -> None:
    """Delete data that no branch, tag, recent reflog entry or running reader needs.

    Safe while other processes commit."""
    with open_repository(named) as repo, Progress("collecting garbage"):
        report = repo.gc(dry_run=dry_run, keep_reflog_s=None if keep_days is None else keep_days * 86400)
    if as_json:
        output.print_json(dataclasses.asdict(report))
        return
    verb = "would remove" if dry_run else "removed"
    gone = [
        words.count(report.commits_removed, "commit"),
        words.count(report.objects_removed, "object"),
        words.count(report.blobs_removed, "blob"),
        words.count(report.packs_removed + report.orphans_removed, "file"),
    ]
    freed, kept = words.nbytes(report.nbytes_freed), words.nbytes(report.nbytes_kept)
    output.line(f"{verb} {', '.join(gone)}: {freed}; {kept} kept")
    if report.packs_waiting:
        output.line(f"{words.count(report.packs_waiting, 'pack')} still in use by a reader; the next gc removes them")
    if report.packs_without_room:
        output.line(f"no space to rewrite {words.count(report.packs_without_room, 'pack')}; run gc again when there is")
    for name in report.strangers:
        output.line(f"left a folder in packs/ that does not belong to thaw: {output.clean(name)}")
    for pack in report.damaged:
        output.line(f"left a damaged pack alone: {pack} (run `thaw fsck`)")
