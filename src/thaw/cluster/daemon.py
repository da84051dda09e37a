"""The process of ours on a node: `python -m thaw.cluster.daemon`, with its settings as JSON on standard input.

It owns the node's folder, its packs and the engines' processes. It is detached and leads a session of its own, so
that it outlives the Ray actor that started it, and Ray itself. It ends when the pool says so, or when it has heard
nothing of the pool for the lease; then the engines end with it, and the folder is removed. Where it was killed, the
engines end when the pool releases them, and the folder goes when the next daemon of this user starts on the machine.

Once it listens it writes one line, its own address as JSON, and closes standard output.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec

from thaw.cluster.engines import EngineProcesses
from thaw.cluster.nixl_agent import agent_or_reason
from thaw.cluster.packs import NodePacks
from thaw.cluster.server import NodeServer
from thaw.cluster.tls import PoolTls, TlsGiven
from thaw.pool.shm.dirs import PREFIX, SHARED, sweep
from thaw.store.leases import start_time


class DaemonSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`key`: the node's name in the pool. `host`: the address to listen on. `secret`: in hex. `tls`: None for plain
    TCP. `nixl`: for KV, where this node has it. `niceness`: to run at, if this user may; None to stay as it was
    started."""

    key: str
    host: str
    secret: str
    lease_s: float
    node_nbytes: int
    folder: str | None = None
    niceness: int | None = None
    tls: TlsGiven | None = None
    nixl: bool = False


class DaemonAddress(msgspec.Struct, frozen=True, kw_only=True):
    """A daemon that listens. `niceness`: what it and the engines run at; `slowed`: that is not what was asked for.
    `no_nixl`: why it has none, "" where it has it or was not asked for it."""

    key: str
    host: str
    port: int
    pid: int
    folder: str
    niceness: int = 0
    slowed: bool = False
    no_nixl: str = ""


def run(settings: DaemonSettings, environment: Mapping[str, str]) -> None:
    """Serve until the end; everything that was made is removed then."""
    folder, niceness = _make_folder(settings), _set_niceness(settings.niceness)
    try:
        tls = None if settings.tls is None else PoolTls(settings.tls)
        nixl, no_nixl = agent_or_reason(settings.nixl)
        listener = socket.create_server((settings.host, 0), backlog=256)
        packs = NodePacks(folder, bytes.fromhex(settings.secret), settings.node_nbytes, tls, nixl)
        engines = EngineProcesses(folder, environment)
        server = NodeServer(
            settings.key, str(folder), listener, bytes.fromhex(settings.secret), engines, packs, settings.lease_s, tls
        )
        threading.Thread(target=server.serve, daemon=True).start()
        host, port = listener.getsockname()[:2]
        slowed = settings.niceness is not None and niceness > settings.niceness
        address = DaemonAddress(
            key=settings.key, host=host, port=port, pid=os.getpid(), folder=str(folder), niceness=niceness,
            slowed=slowed, no_nixl=no_nixl,
        )  # fmt: skip
        _say(address, folder)
        server.wait()
        listener.close()
        engines.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _set_niceness(wanted: int | None) -> int:
    """What it is then. Only root, and users with a limit that allows it, may lower it."""
    if wanted is not None:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, wanted)
    return os.getpriority(os.PRIO_PROCESS, 0)


def _make_folder(settings: DaemonSettings) -> Path:
    """Named as a pool's own is, so that any pool of this user sweeps it where this process was killed."""
    base = Path(settings.folder) if settings.folder else SHARED if SHARED.is_dir() else Path(tempfile.gettempdir())
    sweep(base)
    name = f"{PREFIX}{os.getuid()}-{os.getpid()}-{start_time(os.getpid()) or '?'}-node{secrets.token_hex(4)}"
    (base / name).mkdir(mode=0o700, parents=True)
    return base / name


def _say(address: DaemonAddress, folder: Path) -> None:
    """The line, and from then on the daemon's own log."""
    sys.stdout.write(msgspec.json.encode(address).decode() + "\n")
    sys.stdout.flush()
    log = os.open(folder / "node.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def main() -> None:
    settings = msgspec.json.decode(sys.stdin.readline(), type=DaemonSettings)
    if os.fork():  # whoever started this one is not to end what stays
        os._exit(0)
    os.setsid()
    os.chdir("/")
    run(settings, dict(os.environ))


if __name__ == "__main__":
    main()
