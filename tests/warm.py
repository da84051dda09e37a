"""Warm boots: what an engine spawns is forked from a process that has imported the engine's packages already.

A process that vLLM or SGLang spawns imports them first: 7 to 9 s of a core, two or three times a boot. Here one process
a pytest worker, Python's own fork server, has done so, and the engine's processes begin as forks of it. A boot of vLLM
takes 2 s in place of 14, and 3 s of CPU time in place of 26.

    start(modules)   start the server, with these modules imported
    spawn_from_it()  what this process spawns is forked from it from here on
    popen(command)   a `python -m module` as `subprocess.Popen` would start it is, too

Each process still is one of its own, with the memory, environment, folder and output that it would have had, and runs
the engine's code. It shares with its siblings Python's hash seed, addresses, and what libraries read from the
environment as they are imported. Where PYTHONPATH is another one than at the start, by which a test has a process
import something of its own, or the level of vLLM's log is, that process is a fresh one; with THAW_COLD_BOOTS set all
of them are.
"""

from __future__ import annotations

import io
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import (
    connection,
    context,
    forkserver,
    popen_forkserver,
    popen_spawn_posix,
    process,
    reduction,
    spawn,
    util,
)
from pathlib import Path
from typing import IO, Any

BOOTS = "THAW_BOOT_LOG"
"""A file to which each process that is forked here adds a line: what it runs."""
KNOWN = ((3, 11), (3, 12))
"""Pythons whose fork server takes what is said to it here. In others every boot is a cold one."""
READ_AT_IMPORT = ("PYTHONPATH", "VLLM_LOGGING_LEVEL")

_begun_with: list[str | None] = []
"""The values of `READ_AT_IMPORT` where the server was started or joined."""


def _read_at_import(environment: Mapping[str, str]) -> list[str | None]:
    return [environment.get(name) for name in READ_AT_IMPORT]


def wanted() -> bool:
    return not os.environ.get("THAW_COLD_BOOTS") and sys.version_info[:2] in KNOWN


def start(modules: Sequence[str], environment: Mapping[str, str]) -> None:
    """Start the server, with those of `modules` imported under this environment that this release has."""
    _begun_with[:] = _read_at_import(os.environ)
    forkserver.set_forkserver_preload([__name__, *modules])
    before = dict(os.environ)
    path = (str(Path(__file__).parent), before.get("PYTHONPATH", ""))
    os.environ.update(environment, PYTHONPATH=os.pathsep.join(filter(None, path)))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def spawn_from_it() -> None:
    """Such a process is no child of this one: an engine that ends all of a program's children does not find it."""
    context._concrete_contexts["spawn"] = Warm()


def serves(environment: Mapping[str, str]) -> bool:
    """Whether there is a server, and what it has imported is what a process with this environment would import."""
    return _read_at_import(environment) == _begun_with


def join(address: str, alive_fd: int | None = None) -> None:
    """Fork from the server at this address what this process spawns. `alive_fd` is what the server is held by."""
    server = forkserver._forkserver
    server._forkserver_address = address
    if alive_fd is not None:
        server._forkserver_alive_fd = alive_fd
    server.ensure_running = lambda: None  # type: ignore[method-assign]
    _begun_with[:] = _read_at_import(os.environ)
    spawn_from_it()


class Warm(context.ForkServerContext):
    """Takes the place of the context "spawn": whoever asks for that one has its processes forked from the server."""

    _name = "spawn"

    class Process(context.ForkServerProcess):
        _start_method = "spawn"

        @staticmethod
        def _Popen(begun: Any) -> Any:
            note(begun)
            return Forked(begun) if serves(os.environ) else popen_spawn_posix.Popen(begun)


class Forked(popen_forkserver.Popen):
    """As its base, and what a spawned process would have inherited goes along: environment and output."""

    def _launch(self, begun: Any) -> None:
        written = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(begun._name), written)
            outputs = [reduction.DupFd(fd) for fd in (1, 2)]
            address = forkserver._forkserver._forkserver_address
            reduction.dump(Carried(begun, address, dict(os.environ), outputs), written)
        finally:
            context.set_spawning_popen(None)
        self.sentinel, w = forkserver.connect_to_new_process(self._fds)
        kept = os.dup(w)
        self.finalizer = util.Finalize(self, util.close_fds, (kept, self.sentinel))
        with open(w, "wb", closefd=True) as pipe:
            pipe.write(written.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)


class Carried:
    """A process to be, as the server's fork reads it and begins it."""

    def __init__(self, begun: Any, address: str, environment: dict[str, str], outputs: list[Any]) -> None:
        self.begun, self.address, self.environment, self.outputs = begun, address, environment, outputs

    def _bootstrap(self, parent_sentinel: int | None = None) -> int:
        os.environ.clear()
        os.environ.update(self.environment)
        for fd, output in zip((1, 2), self.outputs, strict=True):
            inherited = output.detach()
            os.dup2(inherited, fd)
            os.close(inherited)
        join(self.address)
        return int(self.begun._bootstrap(parent_sentinel))


def note(begun: Any) -> None:
    if path := os.environ.get(BOOTS):
        with open(path, "a", encoding="utf-8") as log:
            log.write(f"{getattr(begun._target, '__name__', begun.name)}\n")


def popen(command: Sequence[object], *, env: Mapping[str, str], stdout: IO[bytes], **more: Any) -> Any:
    """`[python, "-m", MODULE, …]` in a session of its own, its errors where its output goes."""
    if serves(env):
        return Program(command, env=env, stdout=stdout)
    return subprocess.Popen([str(part) for part in command], env=env, stdout=stdout, **more)


class Program:
    """`python -m MODULE ARGUMENTS`, begun as a fork of the server: its process, in a session of its own."""

    def __init__(self, command: Sequence[object], *, env: Mapping[str, str], stdout: IO[bytes], **more: object) -> None:
        """What else `subprocess.Popen` takes is what a program here gets anyway."""
        _, flag, module, *arguments = [str(part) for part in command]
        assert flag == "-m"
        self.args = command
        self._process = Warm().Process(target=_program, args=(module, arguments, dict(env)), name=module, daemon=True)
        saved = [os.dup(fd) for fd in (1, 2)]
        try:
            for fd in (1, 2):
                os.dup2(stdout.fileno(), fd)
            self._process.start()
        finally:
            for fd, kept in zip((1, 2), saved, strict=True):
                os.dup2(kept, fd)
                os.close(kept)
        self.pid = self._process.pid
        ends = time.monotonic() + 10.0
        while os.getsid(self.pid) != self.pid and self.poll() is None:
            assert time.monotonic() < ends, "it did not begin a session of its own"
            time.sleep(0.001)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(str(self.args), timeout or 0.0)
        return code


def _program(module: str, arguments: list[str], environment: dict[str, str]) -> None:
    os.setsid()
    process.current_process()._config["daemon"] = False  # it may have children; pytest ends it all the same
    os.environ.clear()
    os.environ.update(environment)
    if "THAW_PARENT" in environment:
        os.environ["THAW_PARENT"] = str(os.getppid())  # the server that this is a fork of, which ends when pytest does
    _own_server()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _own_server() -> None:
    """A fork of this process serves what it spawns, so that all of it is in one process group and ends with it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(connection.arbitrary_address("AF_UNIX"))
    listener.listen()
    alive_r, alive_w = os.pipe()
    if os.fork() == 0:
        os.close(alive_w)
        forkserver.main(listener.detach(), alive_r, [])
        os._exit(0)
    os.close(alive_r)
    join(listener.getsockname(), alive_w)
    listener.close()
