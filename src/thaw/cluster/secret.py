"""Who may talk to a daemon: callers that prove that they know the pool's secret. The daemon proves it too.

    daemon → caller    MAGIC | 32 random bytes
    caller → daemon    32 random bytes | HMAC-SHA256(secret, "caller" | MAGIC | both | binding)
    daemon → caller    HMAC-SHA256(secret, "daemon" | MAGIC | both | binding), or the end

The secret is drawn by the pool and never sent over these connections. They are authenticated when they begin. Without
TLS (`tls.py`) they are not encrypted: use them on a network that no one else can change. `binding` is what each side
has seen of TLS: the SHA-256 of the caller's and of the daemon's certificate; without TLS, nothing.
"""

from __future__ import annotations

import hmac
import secrets
import socket

from thaw.cluster.framing import read_exactly

MAGIC = b"thaw node 1\n"
NBYTES = 32
HANDSHAKE_S = 10.0


class StrangerError(OSError):
    """The other side does not know the pool's secret, or speaks something else."""


def new_secret() -> bytes:
    return secrets.token_bytes(NBYTES)


def _proof(secret: bytes, who: bytes, both: bytes, binding: bytes) -> bytes:
    return hmac.digest(secret, who + MAGIC + both + binding, "sha256")


def admit(sock: socket.socket, secret: bytes, binding: bytes = b"") -> None:
    """The daemon's side. Raises `StrangerError`, `OSError`; nothing was read beyond the handshake."""
    sock.settimeout(HANDSHAKE_S)
    ours = secrets.token_bytes(NBYTES)
    sock.sendall(MAGIC + ours)
    said = read_exactly(sock, 2 * NBYTES)
    if said is None:
        raise StrangerError("a caller left before it had shown that it knows the pool's secret")
    both = ours + said[:NBYTES]
    if not hmac.compare_digest(said[NBYTES:], _proof(secret, b"caller", both, binding)):
        raise StrangerError("a caller does not know the pool's secret")
    sock.sendall(_proof(secret, b"daemon", both, binding))
    sock.settimeout(None)


def greet(sock: socket.socket, secret: bytes, binding: bytes = b"") -> None:
    """The caller's side. Raises `StrangerError`, `OSError`."""
    sock.settimeout(HANDSHAKE_S)
    said = read_exactly(sock, len(MAGIC) + NBYTES)
    if said is None or said[: len(MAGIC)] != MAGIC:
        raise StrangerError("what answers there is not a pool's daemon")
    theirs, ours = said[len(MAGIC) :], secrets.token_bytes(NBYTES)
    sock.sendall(ours + _proof(secret, b"caller", theirs + ours, binding))
    proof = read_exactly(sock, NBYTES)
    if proof is None or not hmac.compare_digest(proof, _proof(secret, b"daemon", theirs + ours, binding)):
        raise StrangerError("the daemon there belongs to another pool")
    sock.settimeout(None)
