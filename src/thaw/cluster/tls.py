"""TLS for the connections between daemons, and between a daemon and the client: an option of the cluster's.

Both sides show a certificate. Either all have the pool's own, which it makes for itself and hands to its daemons as it
does its secret; or each has one of its own in files, and all are signed by one authority. The proof of the secret that
follows (`secret.py`) covers the certificates that both sides have seen, so nobody between them can pass it on, whatever
certificate of the authority's they have.

A TLS session cannot be handed to another process, and is not safe for two threads. Where code needs a plain socket,
`plain_end` gives one end of a socket pair, and one thread carries bytes between the other end and the session.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import msgspec

from thaw.core.errors import InvalidRequest, NotFound

VALID_DAYS = 3650
SKEW = datetime.timedelta(days=1)
"""By so much the clocks of nodes may differ."""
SEND_BYTES = 1 << 20
BRIDGE_BYTES = 1 << 16
BINDING_BYTES = 64


class PoolCertificate(msgspec.Struct, frozen=True, kw_only=True, tag="own"):
    """A certificate of one pool's, signed by itself, and its private key: PEM."""

    certificate: str
    key: str

    def __repr__(self) -> str:
        return "PoolCertificate(…)"


class TlsFiles(msgspec.Struct, frozen=True, kw_only=True, tag="files"):
    """Certificates of your own: absolute paths of PEM files, the same on every node and for the client.

    `certificate`: the node's, with any intermediate ones after it; used for both directions, so if it limits its use,
    it must name `serverAuth` and `clientAuth`. `key`: its private key, without a passphrase. `authority`: the
    certificates that may have signed it. Names in certificates are not compared with addresses. Files are read once,
    when a pool or a daemon begins.
    """

    certificate: str
    key: str
    authority: str

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not os.path.isabs(getattr(self, name)):
                raise InvalidRequest(f"tls: {name}={getattr(self, name)!r} must be an absolute path")


TlsGiven = PoolCertificate | TlsFiles


def given_by(tls: bool | TlsFiles) -> TlsGiven | None:
    """What a pool with that setting uses, None for plain TCP. Raises as `new_certificate`."""
    if isinstance(tls, TlsFiles):
        return tls
    return new_certificate() if tls else None


def new_certificate() -> PoolCertificate:
    """For one pool. Raises `NotFound` without the package that makes it."""
    if find_spec("cryptography") is None:
        raise NotFound(
            "tls=True makes a certificate with the package cryptography, which is not installed: pip install "
            "'thaw-vllm[ray]', or give certificates of your own (tls=TlsFiles(…))"
        )
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.timezone.utc)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a pool of thaw")])
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return PoolCertificate(certificate=made.public_bytes(serialization.Encoding.PEM).decode(), key=private.decode())


class PoolTls:
    """Both directions of one process. Safe from any thread."""

    def __init__(self, given: TlsGiven) -> None:
        """Raises `InvalidRequest` for files that cannot be read, or are not what they should be."""
        self._only: bytes | None = None
        try:
            if isinstance(given, PoolCertificate):
                self._own = self._only = ssl.PEM_cert_to_DER_cert(given.certificate)
            else:
                self._own = ssl.PEM_cert_to_DER_cert(_first(Path(given.certificate).read_text("ascii")))
            self._calls = _context(ssl.PROTOCOL_TLS_CLIENT, given)
            self._answers = _context(ssl.PROTOCOL_TLS_SERVER, given)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise InvalidRequest(f"tls: {_naming(given)} cannot be used: {error}") from None

    def call(self, sock: socket.socket) -> tuple[ssl.SSLSocket, bytes]:
        """The caller's handshake on a connection, which is closed where it fails; what binds a proof to both
        certificates. Raises `OSError` (`ssl.SSLError`)."""
        secure = self._calls.wrap_socket(sock)
        return secure, self._own_digest() + self._digest_of_other(secure)

    def answer(self, sock: socket.socket) -> tuple[ssl.SSLSocket, bytes]:
        """The daemon's; as `call`."""
        secure = self._answers.wrap_socket(sock, server_side=True)
        return secure, self._digest_of_other(secure) + self._own_digest()

    def _own_digest(self) -> bytes:
        return sha256(self._own).digest()

    def _digest_of_other(self, secure: ssl.SSLSocket) -> bytes:
        """Of the other side's certificate, which the handshake has checked. The pool's own is the only one it takes."""
        shown = secure.getpeercert(binary_form=True)
        if shown is None or (self._only is not None and shown != self._only):
            secure.close()
            raise ssl.SSLError("the other side shows another certificate than the pool's")
        return sha256(shown).digest()


def _context(protocol: ssl._SSLMethod, given: TlsGiven) -> ssl.SSLContext:
    """TLS 1.3 alone: what was recorded cannot be read later, not even with the key."""
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # sessions are not resumed
    if isinstance(given, PoolCertificate):
        context.load_verify_locations(cadata=given.certificate)
        with _as_file((given.certificate + given.key).encode()) as path:
            context.load_cert_chain(path)
    else:
        context.load_verify_locations(cafile=given.authority)
        context.load_cert_chain(given.certificate, given.key, password=_no_passphrase)
    return context


def _no_passphrase() -> str:
    raise ValueError("the private key has a passphrase; give one without")


@contextlib.contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """OpenSSL takes a private key from a path alone: this one leads to memory, and to no file system."""
    fd = os.memfd_create("thaw-tls", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _first(pem: str) -> str:
    """The first certificate of a file: the one that is shown."""
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    _, found, rest = pem.partition(begin)
    body, ended, _ = rest.partition(end)
    if not found or not ended:
        raise ValueError("no certificate in PEM form is in it")
    return begin + body + end


def _naming(given: TlsGiven) -> str:
    if isinstance(given, PoolCertificate):
        return "the pool's certificate"
    return f"{given.certificate}, {given.key}, {given.authority}"


def send_file(sock: socket.socket, file: BinaryIO, nbytes: int) -> int:
    """The file's first bytes; how many that were. Without TLS the kernel copies them. Raises `OSError`."""
    if not isinstance(sock, ssl.SSLSocket):
        return sock.sendfile(file, 0, nbytes)
    buffer, sent = memoryview(bytearray(min(SEND_BYTES, nbytes))), 0
    while sent < nbytes:
        got = file.readinto(buffer[: nbytes - sent])  # type: ignore[attr-defined]
        if not got:
            break
        sock.sendall(buffer[:got])
        sent += got
    return sent


def plain_end(sock: socket.socket) -> socket.socket:
    """`sock` itself; where it speaks TLS, a socket for which a thread does. Closing it closes the connection."""
    if not isinstance(sock, ssl.SSLSocket):
        return sock
    ours, theirs = socket.socketpair()
    threading.Thread(target=bridge, args=(sock, theirs), name="thaw-tls", daemon=True).start()
    return ours


def bridge(secure: ssl.SSLSocket, plain: socket.socket) -> None:
    """Carry bytes in both directions until one side ends; then both are closed. What one side had sent by then has
    gone to the other."""
    with secure, plain, contextlib.suppress(OSError):
        secure.setblocking(False)
        plain.setblocking(False)
        ways = (_Way(secure, plain), _Way(plain, secure))
        while not any(way.ended for way in ways):
            wanted: dict[int, int] = {}
            if not any([way.step(wanted) for way in ways]):
                poll = select.poll()
                for fd, events in wanted.items():
                    poll.register(fd, events)
                poll.poll()


class _Way:
    """One direction: at most one piece is under way, and the next is read once it is gone."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self._source, self._target = source, target
        self._piece = memoryview(b"")
        self.ended = False

    def step(self, wanted: dict[int, int]) -> bool:
        """Whether something moved; else what it waits for is noted in `wanted`, by file descriptor."""
        waits_on = self._source
        try:
            if not len(self._piece):
                self._piece = memoryview(self._source.recv(BRIDGE_BYTES))
                self.ended = not len(self._piece)
            waits_on = self._target
            if len(self._piece):
                self._piece = self._piece[self._target.send(self._piece) :]
            return True
        except ssl.SSLWantReadError:
            events = select.POLLIN
        except ssl.SSLWantWriteError:
            events = select.POLLOUT
        except BlockingIOError:
            events = select.POLLIN if waits_on is self._source else select.POLLOUT
        wanted[waits_on.fileno()] = wanted.get(waits_on.fileno(), 0) | events
        return False
