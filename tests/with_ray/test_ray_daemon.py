"""A node's daemon without Ray: who may talk to it, what it believes, and how it ends."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from ray_daemons import SECRET, STORE, Start, counts_strangers, daemons, looked, pack

from thaw.cluster.daemon import DaemonAddress, DaemonSettings
from thaw.cluster.framing import MAX_FRAME_BYTES, read_frame, send_frame
from thaw.cluster.keeper import NodeKeeper, address_of
from thaw.cluster.messages import (
    ENCODE,
    EndNode,
    FetchPack,
    LookAtNode,
    PackSource,
    PulledPacks,
    PullPacks,
    RenewLease,
    Reply,
    ServeStore,
)
from thaw.cluster.peer import Peer
from thaw.cluster.secret import MAGIC, StrangerError, admit
from thaw.core.errors import CorruptBlob, InvalidRequest, NotFound, StorageFailed
from thaw.data.tiers.base import MissingPack
from thaw.store.leases import start_time


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Start]:
    """Starts one; all of them end with the test."""
    with daemons(tmp_path) as begin:
        yield begin


def source_of(address: DaemonAddress) -> PackSource:
    return PackSource(key=address.key, host=address.host, port=address.port)


def two(daemon: Start, tmp_path: Path) -> tuple[Peer, DaemonAddress, Peer, Path]:
    """One that serves a folder, and one with a folder of its own."""
    first, address = daemon("a")
    served = tmp_path / "served"
    served.mkdir()
    first.ask(ServeStore(uuid=STORE, folder=str(served)))
    second, _ = daemon("b")
    second.ask(ServeStore(uuid=STORE))
    return first, address, second, served


def test_a_pack_is_sent_whole_and_hashed_where_it_arrives(daemon: Start, tmp_path: Path) -> None:
    first, address, second, served = two(daemon, tmp_path)
    blobs = [os.urandom(3 << 20), os.urandom(100), b"x" * (1 << 20), os.urandom(1)]
    name = pack(served, *blobs)
    ask = PullPacks(uuid=STORE, names=(name,), sources=(source_of(address),))
    done = msgspec.convert(second.ask(ask), PulledPacks)
    size = (served / name).stat().st_size
    assert (done.num_packs, done.nbytes, done.by_source) == (1, size, {"a": size})
    there = Path(str(second.ask(ServeStore(uuid=STORE)))) / name
    assert there.read_bytes() == (served / name).read_bytes() and there.stat().st_mode & 0o777 == 0o600
    assert msgspec.convert(second.ask(ask), PulledPacks).num_packs == 0, "what is there is not fetched again"
    assert looked(first).sent_nbytes == looked(second).received_nbytes == size


@pytest.mark.parametrize("where", ["a blob", "the header", "the end"])
def test_bytes_that_are_not_what_names_them_leave_nothing(daemon: Start, tmp_path: Path, where: str) -> None:
    _, address, second, served = two(daemon, tmp_path)
    name = pack(served, os.urandom(2 << 20), os.urandom(100))
    whole = bytearray((served / name).read_bytes())
    if where == "the end":
        del whole[-10:]
    else:
        whole[-1 if where == "a blob" else 200] ^= 1
    (served / name).write_bytes(whole)
    with pytest.raises(CorruptBlob):
        second.ask(PullPacks(uuid=STORE, names=(name,), sources=(source_of(address),)))
    folder = Path(str(second.ask(ServeStore(uuid=STORE))))
    assert list(folder.iterdir()) == [] and looked(second).num_refused == 1


def test_the_next_source_is_asked_where_one_is_gone_or_has_it_not(daemon: Start, tmp_path: Path) -> None:
    _, address, second, served = two(daemon, tmp_path)
    empty, other = daemon("c")
    empty.ask(ServeStore(uuid=STORE))
    name = pack(served, b"abc")
    dead = PackSource(key="dead", host="127.0.0.1", port=1)
    sources = (dead, source_of(other), source_of(address))
    found = msgspec.convert(second.ask(PullPacks(uuid=STORE, names=(name,), sources=sources)), PulledPacks)
    assert set(found.by_source) == {"a"}
    with pytest.raises(MissingPack):
        second.ask(PullPacks(uuid=STORE, names=("none.safetensors",), sources=(source_of(address),)))
    with pytest.raises(StorageFailed, match="did not send"):
        second.ask(PullPacks(uuid=STORE, names=("none.safetensors",), sources=(dead,)))


def test_a_stranger_is_refused_and_told_nothing(daemon: Start) -> None:
    peer, address = daemon()
    with pytest.raises(StrangerError):
        Peer(address.host, address.port, secrets.token_bytes(32)).ask(LookAtNode())
    with socket.create_connection((address.host, address.port), 5) as sock:
        sock.settimeout(5)
        assert len(sock.recv(1024)) == len(MAGIC) + 32
        send_frame(sock, b"x" * 60)  # 64 bytes, as long as a proof
        assert sock.recv(1024) == b"", "the connection is over, and nothing was said"
    assert counts_strangers(peer, 2)


def test_a_proof_is_of_no_use_on_another_connection(daemon: Start) -> None:
    """What one connection showed, played back to the next one, is a stranger's."""
    peer, address = daemon()
    said: list[bytes] = []

    class Tap(socket.socket):
        def sendall(self, data: bytes, *flags: int) -> None:  # type: ignore[override]
            said.append(bytes(data))
            super().sendall(data, *flags)

    from thaw.cluster.secret import greet

    with Tap(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.connect((address.host, address.port))
        greet(sock, SECRET)
    with socket.create_connection((address.host, address.port), 5) as sock:
        sock.settimeout(5)
        sock.recv(1024)
        sock.sendall(said[0])
        assert sock.recv(1024) == b""
    assert counts_strangers(peer, 1)


def test_a_server_that_does_not_know_the_secret_is_not_believed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        import threading

        def serve() -> None:
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError):
                admit(sock, secrets.token_bytes(32))

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(StrangerError):
            Peer("127.0.0.1", listener.getsockname()[1], SECRET).ask(LookAtNode())


def test_lengths_are_bounded(daemon: Start) -> None:
    peer, _ = daemon()
    with peer.connected() as sock:
        sock.settimeout(5)
        sock.sendall(struct.pack("<I", MAX_FRAME_BYTES + 1))
        assert sock.recv(100) == b"", "nothing of it is read"
    with peer.connected() as sock:
        send_frame(sock, b"\xc1 no message")
        answer = read_frame(sock)
        assert answer is not None and b"invalid-request" in answer
    assert peer.ask(LookAtNode()) is not None


def test_a_pack_that_is_announced_too_long_is_not_taken(daemon: Start, tmp_path: Path) -> None:
    import threading

    second, _ = daemon("b")
    second.ask(ServeStore(uuid=STORE))
    for said in (1 << 40, -1, 3, "many", None):
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def serve(listener: socket.socket = listener, said: object = said) -> None:
                sock, _ = listener.accept()
                with sock, contextlib.suppress(OSError):
                    admit(sock, SECRET)
                    read_frame(sock)
                    send_frame(sock, ENCODE(Reply(value=said)))
                    sock.recv(1)

            threading.Thread(target=serve, daemon=True).start()
            liar = PackSource(key="liar", host="127.0.0.1", port=listener.getsockname()[1])
            with pytest.raises(CorruptBlob, match="announced"):
                second.ask(PullPacks(uuid=STORE, names=("a.safetensors",), sources=(liar,)))


def test_no_path_comes_with_a_name(daemon: Start, tmp_path: Path) -> None:
    first, address, _, _ = two(daemon, tmp_path)
    for name in ("../a.safetensors", "/etc/passwd", "a", ""):
        with pytest.raises(InvalidRequest):
            first.ask(FetchPack(uuid=STORE, name=name))
    with pytest.raises(NotFound):
        first.ask(FetchPack(uuid="8" * 32, name="a.safetensors"))
    with pytest.raises(InvalidRequest):
        first.ask(ServeStore(uuid="../../x"))
    assert address.folder.startswith(str(tmp_path))


def test_the_lease_ends_what_no_pool_asks_for(daemon: Start) -> None:
    peer, address = daemon(lease_s=1.0)
    for _ in range(4):
        time.sleep(0.5)
        peer.ask(RenewLease())
    assert start_time(address.pid) is not None, "renewed, it lives on"
    ends = time.monotonic() + 20
    while start_time(address.pid) is not None:
        assert time.monotonic() < ends
        time.sleep(0.1)
    assert not Path(address.folder).exists()


def test_what_a_node_keeps_is_bounded(daemon: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently used go first, but none that is young."""
    from thaw.cluster.packs import NodePacks

    _, address, _, served = two(daemon, tmp_path)
    names = [pack(served, os.urandom(100_000)) for _ in range(4)]
    node = NodePacks(tmp_path / "small", SECRET, 250_000)
    folder = Path(node.serve(STORE, None))
    for name in names[:3]:
        node.pull(PullPacks(uuid=STORE, names=(name,), sources=(source_of(address),)))
    assert len(list(folder.iterdir())) == 3, "all are young"
    for age, name in enumerate(names[:3]):
        os.utime(folder / name, (1_000_000 + age, 1_000_000 + age))
    node.pull(PullPacks(uuid=STORE, names=(names[0],), sources=(source_of(address),)))  # is used
    node.pull(PullPacks(uuid=STORE, names=(names[3],), sources=(source_of(address),)))
    assert {path.name for path in folder.iterdir()} == {names[0], names[3]}


def test_an_interface_is_named_or_those_that_there_are() -> None:
    assert address_of("lo") == "127.0.0.1"
    with pytest.raises(NotFound, match="lo"):
        address_of("none-such")


def test_a_keeper_finds_the_daemon_that_runs(daemon: Start, tmp_path: Path) -> None:
    peer, address = daemon()
    settings = DaemonSettings(key="a", host="127.0.0.1", secret=SECRET.hex(), lease_s=30.0, node_nbytes=1)
    keeper = NodeKeeper(msgspec.json.encode(settings), msgspec.json.encode(address), None)
    assert msgspec.json.decode(keeper.address(), type=DaemonAddress) == address
    assert msgspec.msgpack.decode(keeper.ask(ENCODE(LookAtNode())))["value"]["pid"] == address.pid
    peer.ask(EndNode())
    ends = time.monotonic() + 20
    while start_time(address.pid) is not None and time.monotonic() < ends:
        time.sleep(0.1)
    with pytest.raises(OSError):
        keeper.ask(ENCODE(LookAtNode()))
