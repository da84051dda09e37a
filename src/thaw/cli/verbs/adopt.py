"""`thaw adopt`: the winner becomes the branch."""

from __future__ import annotations

import click

from thaw.cli import options, output
from thaw.cli.place import open_repository, require_sessions
from thaw.core.ids import short

EXAMPLE = """
thaw adopt fork/2
thaw adopt fork/2 main
"""


@options.verb("adopt", EXAMPLE)
@click.argument("point")
@click.argument("branch", required=False)
@options.as_json
def command(named: str | None, point: str, branch: str | None, as_json: bool) -> None:
    """Move BRANCH (default: the current one) to POINT.

    Its previous position stays in the reflog, as BRANCH@{1}.
    """
    require_sessions()
    with open_repository(named) as repo:
        name = branch or repo.store.head
        before = repo.store.ref(name)
        ref = repo.adopt(point, name)
    old = before.target if before else None
    if as_json:
        output.print_json({"branch": name, "commit": ref.target, "previous": old})
    else:
        was = f"; it was at {short(old)}, now {name}@{{1}}" if old and old != ref.target else ""
        output.line(f"{name} is at {short(ref.target)}{was}")
