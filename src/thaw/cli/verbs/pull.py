"""`thaw pull`: fetch a branch and move the local one forward."""

from __future__ import annotations

import click

from thaw.cli import options, place, transfer

EXAMPLE = """
thaw pull
thaw pull origin main
"""


@options.verb("pull", EXAMPLE)
@click.argument("remote", required=False)
@click.argument("branch", required=False)
@options.as_json
def command(named: str | None, remote: str | None, branch: str | None, as_json: bool) -> None:
    """Fetch BRANCH (default: the current one) from REMOTE and move the local branch forward to it.

    If neither descends from the other, it names both commits and moves nothing; the exit code is 4."""
    with place.open_repository(named) as repo:
        report = transfer.watched("pulling", lambda meter: repo.pull(branch, remote=remote, meter=meter))
    transfer.say(report, "fetched", as_json)
