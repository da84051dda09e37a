"""`thaw branch`: list, make, rename, delete."""

from __future__ import annotations

import click

from thaw.cli import options, refs

EXAMPLE = """
thaw branch
thaw branch idea main~2
thaw branch -m idea better-idea
thaw branch -d better-idea
"""


@options.verb("branch", EXAMPLE)
@click.argument("names", nargs=-1, metavar="[NAME [POINT]]")
@click.option("-d", "--delete", is_flag=True, help="Delete the branches named; their commits stay until gc.")
@click.option("-m", "--move", is_flag=True, help="Rename: -m OLD NEW. HEAD follows.")
@options.as_json
def command(named: str | None, names: tuple[str, ...], delete: bool, move: bool, as_json: bool) -> None:
    """List branches, or make NAME at POINT (default: HEAD)."""
    if delete and move:
        raise click.UsageError("-d deletes and -m renames; give one of the two.")
    refs.act("branch", named, names, "delete" if delete else "rename" if move else "make", as_json)
