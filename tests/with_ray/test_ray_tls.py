"""Daemons with TLS: what a listener sees, who is refused, and that everything works as without it."""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from ray_daemons import SECRET, STORE, Start, counts_strangers, daemons, looked, pack, peer_of
from ray_wire import recorded

from thaw.cluster import RayCluster, TlsFiles
from thaw.cluster.daemon import DaemonSettings
from thaw.cluster.keeper import start
from thaw.cluster.messages import (
    ENCODE,
    AttachEngine,
    LookAtNode,
    PackSource,
    PulledPacks,
    PullPacks,
    ServeStore,
    SpawnEngine,
    value_of,
)
from thaw.cluster.peer import Peer, exchange
from thaw.cluster.secret import StrangerError, admit, greet
from thaw.cluster.tls import PoolCertificate, PoolTls, bridge, new_certificate, plain_end
from thaw.core.errors import EngineDied, InvalidRequest
from thaw.pool.rpc import protocol
from thaw.pool.rpc.client import RpcClient
from thaw.pool.rpc.connection import Connection
from thaw.testing.laws.kit import until

Given = PoolCertificate | TlsFiles | None


@pytest.fixture(scope="module")
def certificate() -> PoolCertificate:
    return new_certificate()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Start]:
    """Starts one; all of them end with the test."""
    with daemons(tmp_path) as begin:
        yield lambda key, tls: begin(key, tls=tls)


def authority(folder: Path, *names: str) -> dict[str, TlsFiles]:
    """An organisation's own: a certificate for each name, signed by one that lies in `ca.pem`."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir()
    now = datetime.datetime.now(datetime.timezone.utc)
    root_key = ec.generate_private_key(ec.SECP256R1())
    root_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "an organisation")])
    found = {}
    for name in ("ca", *names):
        key = root_key if name == "ca" else ec.generate_private_key(ec.SECP256R1())
        subject = root_name if name == "ca" else x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        made = (
            x509.CertificateBuilder(root_name, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
            .sign(root_key, hashes.SHA256())
        )
        (folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        (folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        found[name] = TlsFiles(
            certificate=str(folder / f"{name}.pem"), key=str(folder / f"{name}.key"), authority=str(folder / "ca.pem")
        )
    return found


def pulled_through_a_proxy(daemon: Start, tmp_path: Path, one: Given, other: Given, blob: bytes) -> bool:
    """A pack goes from one daemon to another; whether a listener between them sees its bytes."""
    first, address = daemon("a", one)
    served = tmp_path / secrets.token_hex(4)
    served.mkdir()
    name = pack(served, blob)
    first.ask(ServeStore(uuid=STORE, folder=str(served)))
    second, _ = daemon("b", other)
    second.ask(ServeStore(uuid=STORE))
    with recorded(address) as proxy:
        source = PackSource(key="a", host=proxy.host, port=proxy.port)
        done = msgspec.convert(second.ask(PullPacks(uuid=STORE, names=(name,), sources=(source,))), PulledPacks)
        size = (served / name).stat().st_size
        assert done.nbytes == size <= len(proxy.seen[1]), "all of it went past the listener"
        there = Path(str(second.ask(ServeStore(uuid=STORE)))) / name
        assert there.read_bytes() == (served / name).read_bytes()
        return any(proxy.has(blob[at : at + 32]) for at in range(0, len(blob), 4096)) or proxy.has(name.encode())


def test_a_listener_sees_no_kv(daemon: Start, tmp_path: Path, certificate: PoolCertificate) -> None:
    """The control: over plain TCP it sees it."""
    blob = os.urandom(3 << 20) + b"tail"
    assert pulled_through_a_proxy(daemon, tmp_path, None, None, blob)
    assert not pulled_through_a_proxy(daemon, tmp_path, certificate, certificate, blob)


def test_certificates_of_your_own_do_the_same(daemon: Start, tmp_path: Path) -> None:
    own = authority(tmp_path / "own", "one", "other")
    assert not pulled_through_a_proxy(daemon, tmp_path, own["one"], own["other"], os.urandom(1 << 20))


@pytest.mark.parametrize("secure", [False, True])
def test_a_listener_sees_no_tokens(daemon: Start, secure: bool, certificate: PoolCertificate) -> None:
    """An engine's own line, with its control: text that is asked and text that is answered."""
    tls = certificate if secure else None
    peer, address = daemon("a", tls)
    peer.ask(SpawnEngine(ticket="t" * 32, name="worker-0"))
    with recorded(address) as proxy:
        sock = Peer(proxy.host, proxy.port, SECRET, peer.tls).connect()
        pid = value_of(exchange(sock, ENCODE(AttachEngine(ticket="t" * 32))))
        line = RpcClient(Connection(plain_end(sock)), "worker-0")
        boot = protocol.Boot(id=0, protocol=protocol.PROTOCOL, engine="fake", options={})
        assert line.ask(boot).result(60).pid == pid
        text = "what nobody else may read " * 20_000
        ids = line.ask(protocol.Encode(id=0, text=text, first=True)).result(60)
        back = line.ask(protocol.Decode(id=0, token_ids=ids, skip_special_tokens=True, settled=False)).result(60)
        assert back == text, "half a megabyte each way"
        assert proxy.has(b"what nobody else may read") == (not secure)
        line.tell(protocol.Bye(id=0))
        until(lambda: not Path(f"/proc/{pid}").exists())
        assert looked(peer).engines == {}


def test_a_stranger_with_another_certificate_is_refused(daemon: Start, certificate: PoolCertificate) -> None:
    """Even one that knows the secret."""
    peer, address = daemon("a", certificate)
    with pytest.raises(OSError):
        peer_of(address, new_certificate()).ask(LookAtNode())
    assert counts_strangers(peer, 1)
    with pytest.raises(StrangerError):
        peer_of(address, certificate, secrets.token_bytes(32)).ask(LookAtNode())
    assert counts_strangers(peer, 2), "and the certificate without the secret is not enough either"


def test_a_caller_without_a_certificate_is_refused(daemon: Start, certificate: PoolCertificate) -> None:
    peer, address = daemon("a", certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    sock = socket.create_connection((address.host, address.port), 5)
    with pytest.raises(OSError), context.wrap_socket(sock) as secure:
        greet(secure, SECRET)
    assert counts_strangers(peer, 1)


def test_a_caller_in_plain_text_is_refused_and_told_nothing(daemon: Start, certificate: PoolCertificate) -> None:
    peer, address = daemon("a", certificate)
    with socket.create_connection((address.host, address.port), 5) as sock:
        sock.settimeout(5)
        sock.sendall(secrets.token_bytes(64))
        with contextlib.suppress(ConnectionResetError):
            said = sock.recv(1024)
            assert not said or said[0] == 0x15, "an alert of TLS at most"
    assert counts_strangers(peer, 1)


def test_a_daemon_in_plain_text_is_refused(daemon: Start, certificate: PoolCertificate) -> None:
    """No side falls back to plain text by itself."""
    peer, address = daemon("a", None)
    with pytest.raises(StrangerError, match="TLS"):
        peer_of(address, certificate).ask(LookAtNode())
    assert counts_strangers(peer, 1)


def test_older_tls_is_refused(daemon: Start, certificate: PoolCertificate) -> None:
    _, address = daemon("a", certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((address.host, address.port), 5) as sock, pytest.raises(ssl.SSLError):
        context.wrap_socket(sock)


@pytest.mark.parametrize("bound", [True, False])
def test_nobody_between_two_nodes_can_pass_the_proof_on(tmp_path: Path, bound: bool) -> None:
    """One who has a certificate of the same authority's answers the caller, calls the daemon, and passes the proof of
    the secret on. The control: a proof that does not cover the certificates lets that happen."""
    own = authority(tmp_path / "own", "daemon", "caller", "between")
    daemon, caller, between = (PoolTls(own[name]) for name in ("daemon", "caller", "between"))
    with socket.create_server(("127.0.0.1", 0)) as real, socket.create_server(("127.0.0.1", 0)) as false:

        def serve() -> None:
            with contextlib.suppress(OSError):
                sock, binding = daemon.answer(real.accept()[0])
                with sock:
                    admit(sock, SECRET, binding if bound else b"")
                    sock.sendall(b"what only the pool may read")

        def relay() -> None:
            with contextlib.suppress(OSError):
                sock, _ = between.answer(false.accept()[0])
                there, _ = between.call(socket.create_connection(real.getsockname(), 5))
                bridge(sock, plain_end(there))

        for work in (serve, relay):
            threading.Thread(target=work, daemon=True).start()
        sock, binding = caller.call(socket.create_connection(false.getsockname(), 5))
        with sock:
            if bound:
                with pytest.raises(OSError):
                    greet(sock, SECRET, binding)
            else:
                greet(sock, SECRET)
                assert sock.recv(100) == b"what only the pool may read"


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    own = authority(tmp_path / "own", "one", "other")
    with pytest.raises(InvalidRequest, match=r"certificate='one\.pem' must be an absolute path"):
        TlsFiles(certificate="one.pem", key="/one.key", authority="/ca.pem")
    for changed in (
        {"certificate": str(tmp_path / "none.pem")}, {"key": own["other"].key}, {"authority": own["one"].key},
        {"certificate": own["one"].key},
    ):  # fmt: skip
        with pytest.raises(InvalidRequest, match="cannot be used"):
            PoolTls(msgspec.structs.replace(own["one"], **changed))
    with pytest.raises(InvalidRequest, match="tls='yes'"):
        RayCluster(tls="yes")  # type: ignore[arg-type]
    settings = DaemonSettings(
        key="a", host="127.0.0.1", secret=SECRET.hex(), lease_s=30.0, node_nbytes=1, folder=str(tmp_path),
        tls=msgspec.structs.replace(own["one"], key=str(tmp_path / "none.key")),
    )  # fmt: skip
    with pytest.raises(EngineDied, match=r"none\.key"):
        start(settings)
    assert "BEGIN" not in repr(new_certificate()), "a log holds no key"
