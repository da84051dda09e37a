"""`thaw tag`: list, make, delete."""

from __future__ import annotations

import click

from thaw.cli import options, refs

EXAMPLE = """
thaw tag
thaw tag read-it main
thaw tag -d read-it
"""


@options.verb("tag", EXAMPLE)
@click.argument("names", nargs=-1, metavar="[NAME [POINT]]")
@click.option("-d", "--delete", is_flag=True, help="Delete the tags named; their commits stay until gc.")
@options.as_json
def command(named: str | None, names: tuple[str, ...], delete: bool, as_json: bool) -> None:
    """List tags, or make NAME at POINT (default: HEAD). A tag stays where it is."""
    refs.act("tag", named, names, "delete" if delete else "make", as_json)
