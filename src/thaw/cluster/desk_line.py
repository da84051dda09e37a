"""The pool's side of the desk: a process that may end at any time, and what it means when it does."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitedTooLong
from pathlib import Path
from typing import Any

from thaw.cluster.desk import DESK_REPLIES, ENCODE, DeskCall, DeskReply
from thaw.cluster.framing import read_frame, send_frame
from thaw.core.errors import EngineDied
from thaw.data.fresh_process import with_this_thaw

GRACE_S = 10.0


class RayAway(EngineDied):
    """Ray does not answer, or its process here has ended."""


class KeeperGone(EngineDied):
    """The node's actor has ended, or its node is not in the cluster any more."""


class DaemonGone(EngineDied):
    """The actor is there, and the daemon behind it is not."""


_TROUBLES = {"ray": RayAway, "keeper": KeeperGone, "daemon": DaemonGone, "other": EngineDied}


class DeskLine:
    """A desk's process. `alive` until it ended or was closed; then every question raises `RayAway`."""

    def __init__(self, log: Path | None) -> None:
        ours, theirs = socket.socketpair()
        fd = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "thaw.cluster.desk", str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=fd, stderr=fd, start_new_session=True,
                env=with_this_thaw(os.environ),
            )  # fmt: skip
        finally:
            theirs.close()
            os.close(fd)
        self.pid = self._process.pid
        self._sock, self._lock = ours, threading.Lock()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Future[DeskReply]] = {}
        self.alive = True
        threading.Thread(target=self._read, name="thaw-desk", daemon=True).start()

    def ask(
        self, verb: str, text: str = "", data: bytes = b"", extra: bytes | None = None, limit_s: float = 60.0
    ) -> Any:
        """The value. Raises `RayAway`, `KeeperGone`, `DaemonGone`, `EngineDied`."""
        call = DeskCall(id=next(self._numbers), verb=verb, text=text, data=data, extra=extra, limit_s=limit_s)
        future: Future[DeskReply] = Future()
        with self._lock:
            if not self.alive:
                raise RayAway("the process that had joined Ray for this pool has ended")
            self._waiting[call.id] = future
            with contextlib.suppress(OSError):  # the reader sees it too
                send_frame(self._sock, ENCODE(call))
        try:
            reply = future.result(limit_s + GRACE_S)
        except WaitedTooLong:
            raise RayAway(f"Ray did not answer within {limit_s:.0f} s") from None
        if reply.trouble:
            raise _TROUBLES[reply.trouble](reply.text)
        return reply.value

    def close(self) -> None:
        """Leave Ray. Idempotent."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(GRACE_S / 2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while (data := read_frame(self._sock)) is not None:
                reply = DESK_REPLIES.decode(data)
                with self._lock:
                    future = self._waiting.pop(reply.id, None)
                if future is not None:
                    future.set_result(reply)
        with self._lock:
            self.alive = False
            waiting, self._waiting = self._waiting, {}
        for number, future in waiting.items():
            future.set_result(DeskReply(id=number, trouble="ray", text="the process that had joined Ray has ended"))
        self._sock.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
