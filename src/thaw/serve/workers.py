"""Several servers of one engine for one repository, which end with the program that started them.

They are what a gateway places requests on (`thaw serve --workers N`). Each has a folder, a log and a port of its own.
What a killed program left behind is written down in the repository, and ended by the next one.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from thaw.core.errors import Cancelled
from thaw.data.files import storage_errors
from thaw.engines.kind import Wanted
from thaw.repo import settings
from thaw.repo.choice import URL
from thaw.repo.repository import Repository
from thaw.serve import process, record
from thaw.serve.command import require, require_keys, server_of, with_stored
from thaw.serve.lifecycle import TIMEOUT_S, engine_to_start, sweep
from thaw.serve.process import WaitDisplay, unseen
from thaw.serve.record import Served
from thaw.store import Store

KEY = "workers"
FOLDER = "workers"
HOST = "127.0.0.1"
_RECORDS: msgspec.json.Decoder[list[Served]] = msgspec.json.Decoder(list[Served])


class EngineWorkers:
    """N servers that answer, from `with` on until it is left. Safe from any thread."""

    def __init__(
        self,
        repo: Repository,
        num: int,
        engine: str | None = None,
        model: str | None = None,
        *,
        python: str | None = None,
        arena_nbytes: int | None = None,
        timeout_s: float = TIMEOUT_S,
        arguments: tuple[str, ...] = (),
        environments: Sequence[Mapping[str, str]] = (),
        shown: WaitDisplay = unseen,
    ) -> None:
        """As `thaw.serve.up`, which says what the rest means and is raised. `environments`: what is added to ours, for
        each of them; those without one get what the engine's kind says for several on one machine."""
        require_keys(arguments)
        self._store, self._packs = repo.store, str(repo.store.packs.resolve())
        self._chosen = engine_to_start(self._store, engine, model)
        self._before = settings.recall(self._store)
        self._server = server_of(self._chosen.name)
        self._python = python or sys.executable
        require(self._server, self._python, str(self._chosen.options["model"]), named_one=python is not None)
        self._arena_nbytes, self._timeout_s = arena_nbytes, timeout_s
        self._arguments, self._environments, self._shown = arguments, list(environments), shown
        self._lock = threading.Lock()
        self._ended = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._records: list[Served] = []
        self._num = num

    @property
    def name(self) -> str:
        """Of the engine."""
        return self._chosen.name

    @property
    def urls(self) -> list[str]:
        return [one.url for one in self._records]

    def __enter__(self) -> EngineWorkers:
        end_leftovers(self._store)
        try:
            for number in range(self._num):
                begun, served = self._start(number, process.free_port(HOST))
                self._processes.append(begun)
                self._records.append(served)
                self._write()
            for number in range(self._num):
                self._wait(number, self._shown)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def again(self, number: int) -> str:
        """The address of a worker: its own if it answers, else that of one that is started in its place. Raises what
        starting raises, `Cancelled` once all are ended."""
        with self._lock:
            if self._processes[number].poll() is None and record.answers(self._records[number].url):
                return self._records[number].url
            self._require_open()
            self._end(number)
            port = int(self._records[number].url.rpartition(":")[2])
            begun, served = self._start(number, process.free_port(HOST) if process.is_taken(HOST, port) else port)
            self._processes[number], self._records[number] = begun, served
            self._write()
        self._wait(number, unseen)
        self._require_open()
        return served.url

    def close(self) -> None:
        """End them; asking again is fine."""
        self._ended = True
        with self._lock:
            for number in range(len(self._processes)):
                self._end(number)
            self._store.set_setting(KEY, "[]")
            self._restore()

    def _require_open(self) -> None:
        if self._ended:
            raise Cancelled("the workers were ended")

    def _start(self, number: int, port: int) -> tuple[subprocess.Popen[bytes], Served]:
        folder = self._store.path.resolve() / FOLDER / str(number)
        with storage_errors(folder, "make"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        model = str(self._chosen.options["model"])
        start = self._server.start(
            Wanted(
                model=model,
                host=HOST,
                port=port,
                python=self._python,
                folder=folder,
                stores={self._store.uuid: self._packs},
                arena_nbytes=self._arena_nbytes,
                arguments=with_stored(self._chosen.name, model, self._arguments),
            )
        )
        log = folder / "engine.log"
        begun = process.start(start.command, log, {**start.environment, **self._environment(number)})
        url = f"http://{HOST}:{port}"
        return begun, record.begun(start, begun.pid, engine=self._chosen.name, url=url, model=model, log=log)

    def _environment(self, number: int) -> Mapping[str, str]:
        return self._environments[number] if number < len(self._environments) else {}

    def _wait(self, number: int, shown: WaitDisplay) -> None:
        served = self._records[number]
        prefix = self._server.log_prefix
        process.wait(self._processes[number], served.url, Path(served.log), self._timeout_s, prefix, shown)

    def _end(self, number: int) -> None:
        process.stop(self._records[number].pid, self._processes[number])
        sweep(Path(self._records[number].mail))

    def _write(self) -> None:
        self._store.set_setting(KEY, msgspec.json.encode(self._records).decode())

    def _restore(self) -> None:
        """The repository does not remember addresses that end here."""
        now = settings.recall(self._store)
        if now is not None and now.options.get(URL) in self.urls:
            settings.remember(self._store, self._before or self._chosen)


def end_leftovers(store: Store) -> int:
    """End the workers of a program that was killed; how many ran until now."""
    text = store.get_setting(KEY)
    known: list[Served] = []
    with contextlib.suppress(msgspec.DecodeError):
        known = [] if text is None else _RECORDS.decode(text)
    left = [one for one in known if one.is_here and record.is_alive(one)]
    for one in left:
        process.stop(one.pid)
        sweep(Path(one.mail))
    store.set_setting(KEY, "[]")
    return len(left)
