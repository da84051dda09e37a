"""`thaw tag`: list, make, delete."""

from __future__ import annotations

from thaw.cli import light, refs

EXAMPLE = """
thaw tag
thaw tag read-it main
thaw tag -d read-it
"""


@light.verb(
    "tag",
    EXAMPLE,
    light.Argument("names", many=True, metavar="[NAME [POINT]]"),
    light.Flag("delete", ("-d", "--delete"), "Delete the named tags; commits stay until gc."),
)
def command(named: str | None, names: tuple[str, ...], delete: bool, as_json: bool) -> None:
    """List tags, or create NAME at POINT (default: HEAD). A tag does not move."""
    refs.act("tag", named, names, "delete" if delete else "make", as_json)
