"""`thaw remote`: which remotes the repository knows, and gc of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from thaw.cli import options, output, place, transfer, words
from thaw.cli.progress import Progress

if TYPE_CHECKING:
    from thaw.remote.report import RemoteGcReport

EXAMPLE = """
thaw remote add origin s3://bucket/runs
thaw remote add near file:///mnt/share/runs
thaw remote list
"""
GC_EXAMPLE = """
thaw remote gc origin --dry-run
thaw remote gc origin
"""
MAX_HOURS, MAX_DAYS = 1_000_000, 100_000


@click.group("remote", epilog="\b\nExample:\n" + "\n".join(f"  {line}" for line in EXAMPLE.strip().splitlines()))
def command() -> None:
    """Add, list and remove remotes; delete what one no longer needs."""


@options.verb("add", EXAMPLE)
@click.argument("name")
@click.argument("url")
@transfer.option
@options.as_json
def add(named: str | None, name: str, url: str, pairs: tuple[str, ...], as_json: bool) -> None:
    """Remember the remote at URL as NAME: s3://BUCKET/PREFIX, az://…, gs://… (untested) or file:///FOLDER.

    Nothing is sent. Credentials come from your environment and are never stored."""
    with place.open_repository(named) as repo:
        made = repo.add_remote(name, url, transfer.read_options(pairs))
    if as_json:
        output.print_json({"name": name, "url": made.url, "options": made.options})
    else:
        output.line(f"{name} is {made.url}")


@options.verb("list", "thaw remote list")
@options.as_json
def listing(named: str | None, as_json: bool) -> None:
    """List remotes with their addresses, and where their branches were last seen."""
    from thaw.core.ids import short
    from thaw.remote import settings, tracking

    with place.open_repository(named) as repo:
        found = [(name, remote, tracking.tracked(repo.store, name)) for name, remote in repo.remotes().items()]
        promised = settings.promised(repo.store)
    if as_json:
        listed = [
            {
                "name": name,
                "url": remote.url,
                "options": remote.options,
                "points": {ref.name: ref.target for ref in points},
                "not_fetched": {point: at for point, at in promised.items() if point.startswith(f"{name}/")},
            }
            for name, remote, points in found
        ]
        output.print_json({"remotes": listed})
        return
    if not found:
        output.note("no remotes yet: thaw remote add origin URL")
    for name, remote, points in found:
        output.line(f"{output.style(name, 'bold', 'green')}  {remote.url}")
        output.rows([(ref.name, short(ref.target)) for ref in points], indent="  ")
        waiting = {point: at for point, at in promised.items() if point.startswith(f"{name}/")}
        output.rows([(point, short(at), "not fetched yet") for point, at in waiting.items()], indent="  ")


@options.verb("rm", "thaw remote rm origin")
@click.argument("name")
@options.as_json
def rm(named: str | None, name: str, as_json: bool) -> None:
    """Forget a remote and the points of its branches. The data there stays."""
    with place.open_repository(named) as repo:
        gone = repo.remove_remote(name)
    if as_json:
        output.print_json({"name": name, "url": gone.url})
    else:
        output.line(f"removed {name} (was {gone.url})")


@options.verb("gc", GC_EXAMPLE)
@click.argument("name", required=False)
@click.option("--dry-run", is_flag=True, help="Report what would be written down; delete nothing.")
@click.option("--grace-hours", type=options.Number(0, MAX_HOURS), metavar="H", help="Grace period in hours (24).")
@click.option("--keep-days", type=options.Number(0, MAX_DAYS), metavar="D", help="Keep reflog entries for D days (90).")
@options.as_json
def gc(
    named: str | None,
    name: str | None,
    dry_run: bool,
    grace_hours: float | None,
    keep_days: float | None,
    as_json: bool,
) -> None:
    """Delete what no branch, tag or recent reflog entry of the remote reaches.

    It takes two runs: one writes down what that is; the first one after the grace period deletes it. It is safe while
    others push and fetch."""
    with place.open_repository(named) as repo, Progress("collecting garbage in the remote"):
        report = repo.remote_gc(
            name,
            dry_run=dry_run,
            grace_s=None if grace_hours is None else grace_hours * 3600,
            keep_reflog_s=None if keep_days is None else keep_days * 86400,
        )
    if as_json:
        output.print_json(report)
        return
    if report.dry_run:
        output.line(_predicted(report))
        return
    if report.num_deleted or report.phase == "done":
        output.line(f"deleted {words.count(report.num_deleted, 'object')}: {words.nbytes(report.deleted_nbytes)}")
    if report.num_condemned and report.phase == "waiting":
        output.line(f"{words.count(report.num_condemned, 'object')} of no use{_when(report)}")


def _predicted(report: RemoteGcReport) -> str:
    """Of a dry run. A list that waits for its grace period has no sizes."""
    number = words.count(report.num_condemned, "object")
    if report.seconds_to_wait:
        return f"nothing was deleted; {number} of no use are written down{_when(report)}"
    return f"nothing was deleted; of no use: {number}, {words.nbytes(report.condemned_nbytes)}"


def _when(report: RemoteGcReport) -> str:
    return f"; they can be deleted in {words.seconds(report.seconds_to_wait)}" if report.seconds_to_wait else ""


for one in (add, listing, rm, gc):
    command.add_command(one)
