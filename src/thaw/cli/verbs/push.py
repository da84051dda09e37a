"""`thaw push`: send branches and tags to a remote."""

from __future__ import annotations

import click

from thaw.cli import options, place, transfer

EXAMPLE = """
thaw push -u origin main
thaw push origin fork/0 fork/1
thaw push --all --tags
thaw push --delete origin fork/0
"""


@options.verb("push", EXAMPLE)
@click.argument("remote", required=False)
@click.argument("names", nargs=-1, metavar="[BRANCH]...")
@click.option("-u", "--set-upstream", is_flag=True, help="Remember REMOTE as what the branches push to and pull from.")
@click.option("--all", "everything", is_flag=True, help="Push every branch.")
@click.option("--tags", is_flag=True, help="Push every tag.")
@click.option("-d", "--delete", is_flag=True, help="Delete the named branches or tags in the remote.")
@click.option(
    "--force-with-lease", is_flag=True, help="Replace a branch that is not an ancestor, if it is where you last saw it."
)
@click.option("--weights", is_flag=True, help="Also send the stored weights that the pushed commits need.")
@options.as_json
def command(
    named: str | None,
    remote: str | None,
    names: tuple[str, ...],
    set_upstream: bool,
    everything: bool,
    tags: bool,
    delete: bool,
    force_with_lease: bool,
    weights: bool,
    as_json: bool,
) -> None:
    """Push branches or tags to REMOTE (default: the current branch, to its upstream or origin).

    Only what the remote lacks is sent. If it is interrupted, the same command continues it."""
    if everything and names:
        raise click.UsageError("--all pushes every branch; leave out their names.")
    if delete and (everything or tags or not names):
        raise click.UsageError("--delete takes a remote and the names to delete in it.")
    with place.open_repository(named) as repo:
        report = transfer.watched(
            "pushing",
            lambda meter: repo.push(
                *names, remote=remote, delete=delete, tags=tags, all=everything, force_with_lease=force_with_lease,
                set_upstream=set_upstream, weights=weights, meter=meter,
            ),
        )  # fmt: skip
    transfer.say(report, "sent", as_json)
