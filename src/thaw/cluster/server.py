"""The daemon's door: connections are admitted, questions answered. Of a stranger the handshake is read, and no more."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time

import msgspec

from thaw.cluster.engines import EngineProcesses
from thaw.cluster.framing import read_frame, send_frame
from thaw.cluster.messages import (
    ENCODE,
    QUESTIONS,
    AttachEngine,
    DropPacks,
    EndNode,
    EngineLog,
    FetchPack,
    ForgetStore,
    KillEngine,
    LookAtNode,
    NodeCounts,
    PullPacks,
    Question,
    RenewLease,
    Reply,
    ServeStore,
    SpawnEngine,
    failed,
)
from thaw.cluster.packs import NodePacks
from thaw.cluster.peer import tuned
from thaw.cluster.secret import HANDSHAKE_S, admit
from thaw.cluster.tls import PoolTls, bridge
from thaw.core.errors import InvalidRequest

MAX_CONNECTIONS = 1024


class NodeServer:
    """`ended` is set by `EndNode`, and by whoever finds that the lease is over."""

    def __init__(
        self, key: str, folder: str, listener: socket.socket, secret: bytes, engines: EngineProcesses, packs: NodePacks,
        lease_s: float, tls: PoolTls | None = None,
    ) -> None:  # fmt: skip
        self._key, self._folder, self._listener, self._secret, self._tls = key, folder, listener, secret, tls
        self._engines, self._packs = engines, packs
        self._lease_s, self._until = lease_s, time.monotonic() + lease_s
        self._room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._strangers = 0
        self.ended = threading.Event()

    def serve(self) -> None:
        """Until the listener is closed."""
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            if self._room.acquire(blocking=False):
                threading.Thread(target=self._talk, args=(sock,), daemon=True).start()
            else:
                sock.close()

    def wait(self) -> None:
        """Until the pool says the end, or was not heard of for the lease."""
        while not self.ended.wait(min(1.0, self._lease_s / 4)):
            if time.monotonic() > self._until:
                self.ended.set()

    def _talk(self, sock: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError), self._admitted(sock) as known:
                while (data := read_frame(known)) is not None and self._answer(known, data):
                    pass
        finally:
            self._room.release()

    def _admitted(self, sock: socket.socket) -> socket.socket:
        """Raises `OSError` for a stranger, whose connection is closed then."""
        binding = b""
        try:
            tuned(sock)
            if self._tls is not None:
                sock.settimeout(HANDSHAKE_S)
                sock, binding = self._tls.answer(sock)
            admit(sock, self._secret, binding)
        except OSError:
            self._strangers += 1
            sock.close()
            raise
        return sock

    def _answer(self, sock: socket.socket, data: bytes) -> bool:
        """False when the connection is somebody else's from now on."""
        try:
            question = QUESTIONS.decode(data)
        except msgspec.DecodeError as error:
            send_frame(sock, ENCODE(failed(InvalidRequest(f"this is not a question to a node: {error}"))))
            return False
        try:
            if isinstance(question, FetchPack):
                self._packs.send(sock, question)
                sock.settimeout(None)
                return True
            if isinstance(question, AttachEngine):
                return self._attach(sock, question)
            reply = Reply(value=self._value(question))
        except OSError:
            raise  # of the socket itself, or of a pack that is being sent: the other side must not take it for whole
        except Exception as error:  # noqa: BLE001 - the caller gets it, whatever it is
            reply = failed(error)
        send_frame(sock, ENCODE(reply))
        return True

    def _attach(self, sock: socket.socket, question: AttachEngine) -> bool:
        """The process says nothing before it is asked. A TLS session stays in this process, on this thread."""
        if not isinstance(sock, ssl.SSLSocket):
            send_frame(sock, ENCODE(Reply(value=self._engines.attach(question.ticket, sock))))
            return False
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                pid = self._engines.attach(question.ticket, theirs)
            send_frame(sock, ENCODE(Reply(value=pid)))
            bridge(sock, ours)
        return False

    def _value(self, question: Question) -> object:
        if isinstance(question, RenewLease):
            self._until = time.monotonic() + self._lease_s
        elif isinstance(question, ServeStore):
            return self._packs.serve(question.uuid, question.folder)
        elif isinstance(question, PullPacks):
            return self._packs.pull(question)
        elif isinstance(question, DropPacks):
            self._packs.drop(question.uuid, question.names)
        elif isinstance(question, ForgetStore):
            self._packs.forget(question.uuid)
        elif isinstance(question, SpawnEngine):
            self._engines.expect(question)
        elif isinstance(question, KillEngine):
            self._engines.kill(question.ticket)
        elif isinstance(question, EngineLog):
            return self._engines.log(question.ticket)
        elif isinstance(question, LookAtNode):
            return self._counts()
        elif isinstance(question, EndNode):
            self.ended.set()
        return None

    def _counts(self) -> NodeCounts:
        traffic = self._packs.traffic
        return NodeCounts(
            key=self._key, pid=os.getpid(), folder=self._folder, engines=self._engines.pids(),
            nbytes=self._packs.nbytes(), sent_nbytes=traffic.sent.total(), received_nbytes=traffic.received.total(),
            num_pulls=traffic.pulls, num_refused=traffic.refused, strangers=self._strangers,
            lease_left_s=self._until - time.monotonic(), pushed_nbytes=traffic.pushed, num_fallbacks=traffic.fallbacks,
        )  # fmt: skip
