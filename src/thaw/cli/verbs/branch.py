"""`thaw branch`: list, make, rename, delete."""

from __future__ import annotations

from thaw.cli import light, refs

EXAMPLE = """
thaw branch
thaw branch idea main~2
thaw branch -m idea better-idea
thaw branch -d better-idea
"""


@light.verb(
    "branch",
    EXAMPLE,
    light.Argument("names", many=True, metavar="[NAME [POINT]]"),
    light.Flag("delete", ("-d", "--delete"), "Delete the named branches; commits stay until gc."),
    light.Flag("move", ("-m", "--move"), "Rename: -m OLD NEW. HEAD follows."),
)
def command(named: str | None, names: tuple[str, ...], delete: bool, move: bool, as_json: bool) -> None:
    """List branches, or create NAME at POINT (default: HEAD)."""
    if delete and move:
        raise light.usage("-d deletes and -m renames; use only one of them.")
    refs.act("branch", named, names, "delete" if delete else "rename" if move else "make", as_json)
