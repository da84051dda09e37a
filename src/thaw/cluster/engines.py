"""The engines' processes of a node. Each leads a session of its own, and lives as long as its line to the client.

A process is started on the connection that shows its ticket: from then on the engine's messages go over that
connection, and the daemon has no part in them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from thaw.cluster.messages import SpawnEngine
from thaw.core.errors import EngineDied, NotFound
from thaw.data.files import read_tail
from thaw.data.fresh_process import with_this_thaw

LOG_BYTES = 3000
FAREWELL_S = 25.0
"""An engine whose client is gone closes by itself; when the node ends, so long is waited for it."""


@dataclass
class EngineProcess:
    """`process` is None until somebody attached."""

    wanted: SpawnEngine
    process: subprocess.Popen[bytes] | None = None
    killed: bool = False


class EngineProcesses:
    """Safe from any thread. `environment`: of the processes, before what each is given."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self._lock = threading.Lock()
        self._known: dict[str, EngineProcess] = {}
        self._closed = False

    def expect(self, wanted: SpawnEngine) -> None:
        with self._lock:
            self._known.setdefault(wanted.ticket, EngineProcess(wanted))

    def attach(self, ticket: str, sock: socket.socket) -> int:
        """Start the process of `ticket` on `sock`; its pid. Raises `NotFound`, `EngineDied`."""
        with self._lock:
            found = self._known.get(ticket)
            if found is None:
                raise NotFound("no engine on the node waits for this ticket; it was used already, or never issued")
            if self._closed or found.killed or found.process is not None:
                raise EngineDied("the engine of this ticket was ended, or has its client already")
            found.process = self._start(found.wanted, sock)
            threading.Thread(target=self._bury, args=(ticket, found.process), daemon=True).start()
            return found.process.pid

    def _start(self, wanted: SpawnEngine, sock: socket.socket) -> subprocess.Popen[bytes]:
        log = os.open(self._log(wanted.ticket), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            return subprocess.Popen(
                [sys.executable, "-m", HOST, str(sock.fileno())], pass_fds=[sock.fileno()], stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True, cwd="/",
                env=with_this_thaw({**self._environment, **wanted.env}),
            )  # fmt: skip
        except OSError as error:
            raise EngineDied(f"a worker's process could not be started: {error}") from error
        finally:
            os.close(log)

    def kill(self, ticket: str) -> None:
        """With everything that it started. Idempotent."""
        with self._lock:
            found = self._known.get(ticket)
            if found is not None:
                found.killed = True
                if found.process is not None and found.process.returncode is None:
                    _kill_session(found.process.pid)

    def log(self, ticket: str) -> str:
        """The last lines of its output."""
        with contextlib.suppress(OSError):
            return read_tail(self._log(ticket), LOG_BYTES).decode(errors="replace").strip()
        return ""

    def pids(self) -> dict[str, int]:
        """By the workers' names, of those that run."""
        with self._lock:
            running = [one for one in self._known.values() if one.process is not None]
            return {one.wanted.name: one.process.pid for one in running if one.process is not None}

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            self._closed = True
            processes = [one.process for one in self._known.values() if one.process is not None]
            for process in processes:
                if process.returncode is None:
                    _kill_session(process.pid)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(FAREWELL_S)

    def _bury(self, ticket: str, process: subprocess.Popen[bytes]) -> None:
        """When it has ended, so does what it started; until it is waited for nobody else can have its number."""
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            _kill_session(process.pid)
            process.wait()
            self._known.pop(ticket, None)

    def _log(self, ticket: str) -> Path:
        return self._folder / f"engine-{ticket[:16]}.log"


HOST = "thaw.pool.rpc.server"


def _kill_session(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
