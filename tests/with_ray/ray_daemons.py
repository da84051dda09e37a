"""Daemons of nodes without Ray, for tests of what they say to each other."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from thaw.cluster.daemon import DaemonAddress, DaemonSettings
from thaw.cluster.keeper import start
from thaw.cluster.messages import EndNode, LookAtNode, NodeCounts
from thaw.cluster.peer import Peer
from thaw.cluster.tls import PoolTls, TlsGiven
from thaw.data.pack import PackItem, write_pack
from thaw.testing.laws.kit import until

SECRET = secrets.token_bytes(32)
STORE = "7" * 32
Start = Callable[..., tuple[Peer, DaemonAddress]]


@contextlib.contextmanager
def daemons(folder: Path) -> Iterator[Start]:
    """`begin(key, **settings)` starts one: who talks to it, and where it is. All of them end with the block."""
    peers: list[Peer] = []

    def begin(key: str = "a", **changes: Any) -> tuple[Peer, DaemonAddress]:
        settings = DaemonSettings(
            key=key, host="127.0.0.1", secret=SECRET.hex(), lease_s=30.0, node_nbytes=1 << 30, folder=str(folder)
        )  # fmt: skip
        settings = msgspec.structs.replace(settings, **changes)
        address = start(settings)
        peers.append(peer_of(address, settings.tls))
        return peers[-1], address

    yield begin
    for peer in peers:
        with contextlib.suppress(OSError):
            peer.ask(EndNode())


def peer_of(address: DaemonAddress, tls: TlsGiven | None = None, secret: bytes = SECRET) -> Peer:
    return Peer(address.host, address.port, secret, None if tls is None else PoolTls(tls))


def looked(peer: Peer) -> NodeCounts:
    return msgspec.convert(peer.ask(LookAtNode()), NodeCounts)


def counts_strangers(peer: Peer, count: int) -> bool:
    """Whether the daemon has turned away as many by now. A caller may hear of it before the daemon has counted it."""
    with contextlib.suppress(AssertionError):
        until(lambda: looked(peer).strangers >= count, limit_s=10.0)
    return bool(looked(peer).strangers == count)


def pack(folder: Path, *blobs: bytes) -> str:
    """Its name."""
    items = [PackItem("", "U8", (len(data),), len(data), lambda data=data: data) for data in blobs]  # type: ignore[misc]
    name = f"{secrets.token_hex(8)}.safetensors"
    write_pack(folder, name, items)
    return name
