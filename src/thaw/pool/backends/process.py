"""The backend of local processes: a host process for each worker, killed and booted again as need be."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from thaw.core.errors import EngineDied, TimedOut, Unsupported
from thaw.data.files import read_tail
from thaw.data.fresh_process import with_this_thaw
from thaw.engines.base import Engine
from thaw.pool.backends.base import WorkerHandle, WorkerSpec
from thaw.pool.rpc import protocol
from thaw.pool.rpc.client import EngineProxy, RpcClient
from thaw.pool.rpc.connection import Connection
from thaw.pool.rpc.protocol import Booted
from thaw.pool.shm.dirs import PoolDirs

FAREWELL_S = 25.0
NOT_SENT = (
    "the workers are processes of their own, to which no function can be sent: give update as 'module:function', "
    "importable there, or make the pool with backend='inline'"
)


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
        if update is not None and not isinstance(update, str):
            raise Unsupported(NOT_SENT)

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


class ProcessHandle:
    """A host process and the line to it."""

    engine: Engine

    def __init__(self, dirs: PoolDirs, process: subprocess.Popen[bytes], line: RpcClient, log: Path) -> None:
        self._dirs, self._process, self._line, self._log = dirs, process, line, log
        self.pid: int | None = process.pid
        self.boot_s = 0.0

    def start(self, engine: str, options: dict[str, Any], limit_s: float) -> None:
        began = time.perf_counter()
        call = protocol.Boot(id=0, protocol=protocol.PROTOCOL, engine=engine, options=options)
        try:
            booted: Booted = self._line.ask(call).result(limit_s)
        except TimedOut:
            raise EngineDied(f"the worker did not boot within {limit_s:.0f} s{self._last_words()}") from None
        except EngineDied as error:
            raise EngineDied(f"{error}{self._last_words()}") from None
        self.engine = EngineProxy(self._line, booted)
        self.boot_s = time.perf_counter() - began

    def alive(self) -> bool:
        """Looks without reaping: as long as it is not reaped nobody else can have its number."""
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        return False

    def on_end(self, callback: Callable[[], None]) -> None:
        self._line.on_end = callback

    def check(self, limit_s: float) -> bool:
        silent = time.monotonic() - self._line.heard
        if silent > limit_s / 3:
            self._line.tell(protocol.Ping(id=0))
        return silent < limit_s

    def invoke(self, update: str | Callable[[Engine], object], arguments: dict[str, Any]) -> Any:
        if not isinstance(update, str):
            raise Unsupported(NOT_SENT)
        assert isinstance(self.engine, EngineProxy)
        return self.engine.invoke(update, arguments)

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

    def _last_words(self) -> str:
        """The last lines of its log, for the error."""
        with contextlib.suppress(OSError):
            lines = read_tail(self._log, 3000).decode(errors="replace").strip().splitlines()[-5:]
            return ": " + " | ".join(lines) if lines else ""
        return ""
