"""The server that the repository started or joined: whether it runs, and what its kind of engine says of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from thaw.core.errors import NotFound, ThawError
from thaw.core.findings import Finding
from thaw.engines.kind import Server
from thaw.engines.registry import kind_of
from thaw.repo import settings
from thaw.serve import record as served
from thaw.serve.record import Served
from thaw.store import Store


def findings(folder: Path) -> Iterator[Finding]:
    """Nothing where no server was started or joined, or no repository is."""
    known, name, url = _recall(folder)
    if url and (known is None or known.url != url):
        for one in url.split(","):
            yield from _joined(name, one)
        return
    if known is None:
        return
    what = f"{known.engine} at {known.url} (process {known.pid}, {known.model})"
    if not served.is_alive(known):
        yield Finding(
            name="server",
            status="warning",
            text=f"{what} is gone",
            advice=f"Its log may say why: {known.log}. `thaw down` clears it, `thaw up` starts a new one.",
        )
    elif not served.answers(known.url):
        yield Finding(
            name="server",
            status="warning",
            text=f"{what} is running but does not answer",
            advice=f"It may still be starting; log: {known.log}",
        )
    else:
        yield Finding(name="server", status="ok", text=f"{what} is up and answers")
        yield from _started(known)


def _recall(folder: Path) -> tuple[Served | None, str, str]:
    """The server that `thaw up` started; the engine that the verbs join, and its address ("": none)."""
    if not (folder / "thaw.db").is_file():
        return None, "", ""
    try:
        with Store.open(folder) as store:
            engine = settings.recall(store)
            name, options = (engine.name, engine.options) if engine is not None else ("", {})
            return served.recall(store), name, str(options.get("url", ""))
    except ThawError:
        return None, "", ""  # that the repository is damaged is fsck's to say


def _joined(engine: str, url: str) -> Iterator[Finding]:
    """A server that somebody else started."""
    server = _server(engine)
    return iter(()) if server is None else server.joined(url)


def _started(known: Served) -> Iterator[Finding]:
    server = _server(known.engine) if known.is_here else None
    return iter(()) if server is None else server.started(Path(known.mail), known.log)


def _server(engine: str) -> Server | None:
    """None, too, for an engine that is not installed here; `software` says which are."""
    try:
        return kind_of(engine).server
    except NotFound:
        return None
