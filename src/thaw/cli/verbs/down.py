"""`thaw down`: end the engine that `thaw up` started."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from thaw.cli import boot, options, output, place
from thaw.cli.progress import Progress
from thaw.core.errors import Busy, CorruptDatabase
from thaw.serve import process as server

if TYPE_CHECKING:
    from thaw.serve.record import Served
    from thaw.store import Store

EXAMPLE = """
thaw down
"""


@options.verb("down", EXAMPLE)
@options.as_json
def command(named: str | None, as_json: bool) -> None:
    """End the engine that `thaw up` started. That none is up is fine.

    Commits are on disk and stay; sessions that were only in the engine are gone.
    """
    with place.open_repository(named) as repo:
        known, ended = _end(repo.store)
    if as_json:
        output.print_json({"ended": ended, "url": known.url if known else None, "pid": known.pid if known else None})
    elif known is None:
        output.line("no engine is up")
    else:
        output.line(f"{known.engine} at {known.url} {'ended' if ended else 'was gone already'}")


def _end(store: Store) -> tuple[Served | None, bool]:
    """(what was recorded, whether it ran until now). Clears the record."""
    from thaw.serve import record as served

    try:
        known = served.recall(store)
    except CorruptDatabase:
        known = None
    alive = known is not None and served.is_alive(known)
    if known is not None and alive:
        if not known.is_here:
            raise Busy(f"{known.engine} at {known.url} runs on {known.host}: type `thaw down` there")
        with Progress("ending the engine"):
            server.stop(known.pid)
    if known is not None and known.is_here:
        _sweep(Path(known.mail))
    served.remember(store, None)
    _restore(store, known)
    return known, alive


def _sweep(mail: Path) -> None:
    """Remove the mail folder, which `thaw up` had made for this server alone. A data-parallel one has a folder in it
    for each rank."""
    places = (mail, *mail.glob("dp*"))
    if mail.is_absolute() and any((place / "facts").is_dir() and (place / "answers").is_dir() for place in places):
        shutil.rmtree(mail, ignore_errors=True)


def _restore(store: Store, known: Served | None) -> None:
    """The repository remembers again what it did before, or the same model to be loaded by the verbs themselves."""
    from thaw.repo.settings import EngineSettings, recall, remember

    now = recall(store)
    if known is None or now is None or now.options.get(boot.URL) != known.url:
        return
    remember(store, known.before or EngineSettings(name=known.engine, options={"model": known.model}))
