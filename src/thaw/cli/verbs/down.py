"""`thaw down`: end the engine that `thaw up` started."""

from __future__ import annotations

from thaw.cli import options, output, place
from thaw.cli.progress import Progress

EXAMPLE = """
thaw down
"""


@options.verb("down", EXAMPLE)
@options.as_json
def command(named: str | None, as_json: bool) -> None:
    """Stop the server that `thaw up` started. It is not an error if none is running.

    Commits stay on disk. Sessions that were only in the engine are lost.
    """
    from thaw import serve

    with place.open_repository(named) as repo:
        known, ended = serve.down(repo, shown=Progress)
    if as_json:
        output.print_json({"ended": ended, "url": known.url if known else None, "pid": known.pid if known else None})
    elif known is None:
        output.line("no engine server is up")
    else:
        output.line(f"{known.engine} at {known.url} {'stopped' if ended else 'was already gone'}")
