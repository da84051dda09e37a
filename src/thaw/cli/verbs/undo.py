"""`thaw undo`: a branch goes back to where it was before its last move."""

from __future__ import annotations

import click

from thaw.cli import options, output, place, view

EXAMPLE = """
thaw undo
thaw undo idea
"""


@options.verb("undo", EXAMPLE)
@click.argument("name", required=False)
@options.as_json
def command(named: str | None, name: str | None, as_json: bool) -> None:
    """Undo the last move of a branch or tag (default: the current branch).

    A move is a commit, an adoption or a deletion. Nothing is deleted: undo moves the name back, and the reflog keeps
    its previous position. Each undo goes one move further back; `thaw adopt NAME@{1} NAME` goes forward again.
    """
    with place.open_repository(named) as repo:
        if repo.store.ref(name or repo.store.head) is not None:  # a weights set that was removed may come back
            place.require_sessions()
        done = repo.undo(name)
    if as_json:
        output.print_json(done)
        return
    where = f"is at {view.commit_id(done.new)} again" if done.new else "is gone, as before it was created"
    output.line(f"{done.kind} {done.name} {where} (undone: {output.one_line(done.reason, 60)})")
