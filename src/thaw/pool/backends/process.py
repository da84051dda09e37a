"""The backend of local processes: a host process for each worker, killed and booted again as need be."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from thaw.core.errors import EngineDied
from thaw.data.files import read_tail
from thaw.data.fresh_process import with_this_thaw
from thaw.engines.base import Engine
from thaw.pool.backends.base import WorkerHandle, WorkerSpec
from thaw.pool.backends.line import FAREWELL_S, LineHandle, named
from thaw.pool.rpc import protocol
from thaw.pool.rpc.client import RpcClient
from thaw.pool.rpc.connection import Connection
from thaw.pool.shm.dirs import PoolDirs


class ProcessBackend:
    """Each worker is `python -m thaw.pool.rpc.server`, leader of a session of its own."""

    restarts = True

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec, self._dirs = spec, spec.dirs
        self._lock = threading.Lock()
        self._booting: set[ProcessHandle] = set()
        self._closed = False

    def boot(self, index: int, name: str, policy_version: str | None) -> WorkerHandle:
        options = self._spec.options_for(policy_version)
        log = self._dirs.path / f"{name}.log"
        process, ours = _spawn(log, self._environment(index))
        self._dirs.began(process.pid)
        line = RpcClient(Connection(ours), name)
        host = ProcessHandle(self._dirs, process, line, log)
        try:
            self._start(host, options)
        except BaseException:
            host.kill()
            raise
        return host

    def _start(self, host: ProcessHandle, options: dict[str, Any]) -> None:
        with self._lock:
            if self._closed:
                raise EngineDied("the pool was closed while a worker booted")
            self._booting.add(host)
        try:
            host.start(self._spec.engine, options, self._spec.boot_timeout_s)
        finally:
            with self._lock:
                self._booting.discard(host)

    def check_update(self, update: str | Callable[[Engine], object] | None) -> None:
        if update is not None:
            named(update)

    def close(self) -> None:
        with self._lock:
            self._closed, booting = True, list(self._booting)
        for host in booting:
            host.kill()

    def _environment(self, index: int) -> dict[str, str]:
        """This process', with this very thaw first on the path, and what was given for this worker."""
        return with_this_thaw({**os.environ, **self._spec.env_of(index)})


def _spawn(log: Path, environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "thaw.pool.rpc.server", str(theirs.fileno())], pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=fd, stderr=fd, start_new_session=True, env=environment,
        )  # fmt: skip
    except OSError as error:
        ours.close()
        raise EngineDied(f"a worker's process could not be started: {error}") from error
    finally:
        theirs.close()
        os.close(fd)
    return process, ours


class ProcessHandle(LineHandle):
    """A host process and the line to it."""

    def __init__(self, dirs: PoolDirs, process: subprocess.Popen[bytes], line: RpcClient, log: Path) -> None:
        super().__init__(line, process.pid)
        self._dirs, self._process, self._log_path = dirs, process, log

    def alive(self) -> bool:
        """Looks without reaping: as long as it is not reaped nobody else can have its number."""
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        return False

    def on_end(self, callback: Callable[[], None]) -> None:
        self._line.on_end = callback

    def kill(self) -> None:
        self._kill_session()
        self._line.end("the worker was killed by its pool")
        self._reap()

    def close(self) -> None:
        self._line.tell(protocol.Bye(id=0))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(FAREWELL_S)
        self.kill()

    def _kill_session(self) -> None:
        """Before the leader is waited for: until then nobody else can have its number."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _reap(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(FAREWELL_S)
            self._dirs.ended(self._process.pid)

    def _log(self) -> str:
        with contextlib.suppress(OSError):
            return read_tail(self._log_path, 3000).decode(errors="replace")
        return ""
