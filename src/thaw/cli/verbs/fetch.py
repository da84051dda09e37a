"""`thaw fetch`: bring a remote's branches here, as points."""

from __future__ import annotations

import click

from thaw.cli import options, place, transfer

EXAMPLE = """
thaw fetch
thaw fetch origin main
thaw fetch origin main --depth 3
thaw log origin/main
"""


@options.verb("fetch", EXAMPLE)
@click.argument("remote", required=False)
@click.argument("names", nargs=-1, metavar="[BRANCH]...")
@click.option("-p", "--prune", is_flag=True, help="Remove points of branches that were deleted in the remote.")
@click.option("--no-tags", is_flag=True, help="Fetch no tags.")
@click.option("--weights", is_flag=True, help="Also fetch the weights that the fetched commits need.")
@click.option("--depth", type=click.IntRange(min=1), metavar="N", help="Fetch only the last N commits of each branch.")
@click.option("--unshallow", is_flag=True, help="Also fetch what an earlier --depth left in the remote.")
@options.as_json
def command(
    named: str | None,
    remote: str | None,
    names: tuple[str, ...],
    prune: bool,
    no_tags: bool,
    weights: bool,
    depth: int | None,
    unshallow: bool,
    as_json: bool,
) -> None:
    """Fetch branches (default: all) and tags from REMOTE. Its branch main is then the point origin/main.

    Every byte is checked as it arrives. No local branch moves; see `thaw pull`."""
    if depth is not None and unshallow:
        raise click.UsageError("--depth leaves older commits in the remote, --unshallow fetches them: choose one.")
    with place.open_repository(named) as repo:
        report = transfer.watched(
            "fetching",
            lambda meter: repo.fetch(
                *names, remote=remote, prune=prune, tags=not no_tags, weights=weights, meter=meter, depth=depth,
                unshallow=unshallow,
            ),
        )  # fmt: skip
    transfer.say(report, "fetched", as_json)
