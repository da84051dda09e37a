"""The engine server of a repository: started in the background, found again, ended.

A repository has one such server at a time, for all its namespaces. While it is up, the repository remembers it as its
engine, and booting the repository's engine joins it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import msgspec

from thaw.core.errors import Busy, CorruptDatabase, InvalidRequest
from thaw.engines.kind import Wanted
from thaw.repo import settings
from thaw.repo.choice import URL, choose
from thaw.repo.repository import Repository
from thaw.serve import process, record
from thaw.serve.command import has_server, log_of, require, require_keys, server_of, with_stored
from thaw.serve.process import WaitDisplay, unseen
from thaw.serve.record import Served
from thaw.store import Store
from thaw.weights.names import to_folder

TIMEOUT_S = 900.0


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """A server that answers, after so many seconds."""

    record: Served
    seconds: float


def up(
    repo: Repository,
    engine: str | None = None,
    model: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    python: str | None = None,
    arena_nbytes: int | None = None,
    timeout_s: float = TIMEOUT_S,
    arguments: tuple[str, ...] = (),
    shown: WaitDisplay = unseen,
) -> Started:
    """Start the stock server of an engine with thaw in it, and return when it answers. It outlives this process.

    `engine` and `model`: by default those that the repository remembers. `port`: by default a free one. `python`: the
    one that has engine and thaw, by default ours. `arguments` are the engine's own. `shown`: how the wait is shown.

    Raises `Busy` where one is up, `NoServer`, `InvalidRequest` (a port that is taken, a key that cannot be sent),
    `NotFound` (no engine in that Python), `EngineDied`, `TimedOut`; then nothing is left running.
    """
    require_keys(arguments)
    store, interpreter = repo.store, python or sys.executable
    _refuse_second(store)
    chosen = engine_to_start(store, engine, model)
    kind, path = server_of(chosen.name), str(chosen.options["model"])
    require(kind, interpreter, path, named_one=python is not None)
    port = _port(host, port)
    log = log_of(store)
    start = kind.start(
        Wanted(
            model=path,
            host=host,
            port=port,
            python=interpreter,
            folder=repo.path.resolve(),
            stores={store.uuid: str(store.packs.resolve())},
            arena_nbytes=arena_nbytes,
            arguments=with_stored(chosen.name, path, arguments),
        )
    )
    begun = process.start(start.command, log, start.environment)
    url = f"http://{reachable(host)}:{port}"
    served = record.begun(start, begun.pid, engine=chosen.name, url=url, model=path, log=log, before=_before(store))
    return Started(record=served, seconds=_bring_up(store, served, begun, timeout_s, kind.log_prefix, shown))


def running(repo: Repository) -> Served | None:
    """The server that was started for this repository, where it still runs. Raises `CorruptDatabase`."""
    known = record.recall(repo.store)
    return known if known is not None and record.is_alive(known) else None


def down(repo: Repository, *, shown: WaitDisplay = unseen) -> tuple[Served | None, bool]:
    """End it: what was recorded, and whether it ran until now. That none is up is fine.

    Commits stay; sessions that were only in the engine are gone. Raises `Busy` where it runs on another host."""
    store = repo.store
    try:
        known = record.recall(store)
    except CorruptDatabase:
        known = None
    alive = known is not None and record.is_alive(known)
    if known is not None and alive:
        if not known.is_here:
            raise Busy(f"{known.engine} at {known.url} runs on {known.host}: run `thaw down` there")
        with shown("stopping the engine", lambda: ""):
            process.stop(known.pid)
    if known is not None and known.is_here:
        sweep(Path(known.mail))
    record.remember(store, None)
    _restore(store, known)
    return known, alive


def _refuse_second(store: Store) -> None:
    known = record.recall(store)
    if known is not None and record.is_alive(known):
        what = f"{known.engine} is up already at {known.url} (process {known.pid}, {known.model})"
        raise Busy(f"{what}. Stop it first: thaw down")


def engine_to_start(store: Store, engine_name: str | None, model: str | None) -> settings.EngineSettings:
    """The engine to start; a server that is gone does not count as the one that is remembered."""
    from thaw.engines.registry import DEFAULT_SERVER

    if engine_name is not None:
        server_of(engine_name)
    known = _before(store) or settings.recall(store)
    name = engine_name or (known.name if known is not None and has_server(known.name) else DEFAULT_SERVER)
    if model is None and known is not None and "model" in known.options:
        return settings.EngineSettings(name=name, options={"model": to_folder(store, known.options["model"])})
    return choose(None, name, model if model is None else str(to_folder(store, model)))


def _before(store: Store) -> settings.EngineSettings | None:
    """What the repository remembers besides servers."""
    known, old = settings.recall(store), record.recall(store)
    if known is not None and URL in known.options:
        return old.before if old is not None else None
    return known


def _port(host: str, port: int | None) -> int:
    if port is None:
        return process.free_port(host)
    if process.is_taken(host, port):
        raise InvalidRequest(f"port {port} is in use on {host}; name another, or leave out --port for a free one")
    return port


def reachable(host: str) -> str:
    """How this machine reaches a server that listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _bring_up(
    store: Store, served: Served, begun: subprocess.Popen[bytes], timeout_s: float, log_prefix: str, shown: WaitDisplay
) -> float:
    """Seconds until it answered. It is written down before that, so that `down` finds it whatever happens here."""
    record.remember(store, served)
    try:
        seconds = process.wait(begun, served.url, Path(served.log), timeout_s, log_prefix, shown)
    except BaseException:
        record.remember(store, None)
        raise
    settings.remember(store, settings.EngineSettings(name=served.engine, options={URL: served.url}))
    return seconds


def sweep(mail: Path) -> None:
    """Remove the mail folder, which `thaw up` had made for this server alone. A data-parallel one has a folder in it
    for each rank."""
    places = (mail, *mail.glob("dp*"))
    if mail.is_absolute() and any((place / "facts").is_dir() and (place / "answers").is_dir() for place in places):
        shutil.rmtree(mail, ignore_errors=True)


def _restore(store: Store, known: Served | None) -> None:
    """The repository remembers again what it did before, or the same model to be loaded by the verbs themselves."""
    now = settings.recall(store)
    if known is None or now is None or now.options.get(URL) != known.url:
        return
    settings.remember(store, known.before or settings.EngineSettings(name=known.engine, options={"model": known.model}))
