"""The keeper: Ray's actor on a node. It starts the node's daemon, or finds the one that runs, and passes questions on.

Ray needs no CPU for it, and pins it to its node. It holds nothing that matters: when it ends, whatever for, the daemon
goes on, and another keeper finds it. `ray.remote` is said where it is made (`desk.py`); Ray is not imported here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import msgspec

from thaw.cluster.daemon import DaemonAddress, DaemonSettings
from thaw.cluster.peer import Peer
from thaw.cluster.tls import PoolTls
from thaw.core.errors import EngineDied, NotFound
from thaw.data.fresh_process import with_this_thaw

SMALL_BYTES = 64 << 10
"""What goes through Ray is smaller than this, well below what it would put into its object store (100 KiB)."""
START_S = 60.0
KEEPER_LIMIT_S = 60.0
"""For an actor and its daemon to begin."""
PULL_S = 3600.0
SET_BY_RAY = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LD_PRELOAD")
"""What Ray sets for its own workers: an engine gets what the node was started with."""
_SIOCGIFADDR = 0x8915


class NodeKeeper:
    """`settings` is JSON of `DaemonSettings`. `running`: JSON of the address of the daemon to find, else one
    is started. `interface`: the one to listen on; its address takes the place of the settings'."""

    def __init__(self, settings: bytes, running: bytes | None, interface: str | None) -> None:
        wanted, own = msgspec.json.decode(settings, type=DaemonSettings), niceness()
        if own is not None:
            with contextlib.suppress(PermissionError):
                os.setpriority(os.PRIO_PROCESS, 0, own)
        if running is not None:
            self._address = msgspec.json.decode(running, type=DaemonAddress)
        else:
            if interface is not None:
                wanted = msgspec.structs.replace(wanted, host=address_of(interface))
            self._address = start(msgspec.structs.replace(wanted, niceness=own))
        tls = None if wanted.tls is None else PoolTls(wanted.tls)
        self._peer = Peer(self._address.host, self._address.port, bytes.fromhex(wanted.secret), tls)

    def address(self) -> bytes:
        return msgspec.json.encode(self._address)

    def ask(self, data: bytes) -> bytes:
        """A question, and its answer. Raises `OSError` where the daemon is gone."""
        answer = self._peer.ask_raw(data, PULL_S)
        if len(answer) > SMALL_BYTES:
            raise ValueError(f"an answer of {len(answer)} bytes is too large for Ray, which gets at most {SMALL_BYTES}")
        return answer


def start(settings: DaemonSettings) -> DaemonAddress:
    """A daemon on this machine. Raises `EngineDied`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "thaw.cluster.daemon"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=with_this_thaw(environment()), start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write(msgspec.json.encode(settings) + b"\n")
    process.stdin.close()
    line = process.stdout.readline()
    process.stdout.close()
    if not line:
        words = process.stderr.read(2000).decode(errors="replace").strip().splitlines()[-3:]
        raise EngineDied(f"the node's daemon could not be started on {settings.host}: {' | '.join(words)}")
    process.stderr.close()
    process.wait(START_S)
    return msgspec.json.decode(line, type=DaemonAddress)


def environment() -> dict[str, str]:
    """What the node was started with, as far as Ray changed it for this actor, and nothing of Ray's own."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    node = _environment_of(os.environ.get("RAY_RAYLET_PID", ""))
    for name in SET_BY_RAY:
        found.pop(name, None)
        if name in node and name != "LD_PRELOAD":
            found[name] = node[name]
    return found


def niceness() -> int | None:
    """The node's own: Ray makes its workers nicer, by 15, and an engine is not to inherit that."""
    try:
        return os.getpriority(os.PRIO_PROCESS, int(os.environ["RAY_RAYLET_PID"]))
    except (KeyError, ValueError, OSError):
        return None


def _environment_of(pid: str) -> dict[str, str]:
    try:
        data = Path(f"/proc/{int(pid)}/environ").read_bytes()
    except (OSError, ValueError):
        return {}
    return dict(line.split("=", 1) for line in data.decode(errors="surrogateescape").split("\0") if "=" in line)


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface of this machine. Raises `NotFound`, naming those that there are."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            asked = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, asked)[20:24])
        except OSError:
            there = ", ".join(name for _, name in socket.if_nameindex())
            raise NotFound(
                f"{os.uname().nodename} has no address on interface {interface!r}; there are: {there}"
            ) from None
