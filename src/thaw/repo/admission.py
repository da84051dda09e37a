"""What is live on an engine through one repository, and whether more may begin.

A repository and its namespaces share one `Admission`. It knows the sessions that are open (weakly: one that nobody
holds any more cannot go on and is not counted) and the work under way, and closes the door for a drain: what would
begin is then refused with `Busy`. No tokens and no KV here.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from thaw.core.errors import Busy, Stopped
from thaw.core.ids import CommitId, short
from thaw.engines.base import Completion, Handle, SessionRef

T = TypeVar("T")


class Drained(Stopped):
    """A drain ended this generation. `points`: the commits to continue, by session, in the batch's order; a session
    that was not captured has none, and the message says why."""

    def __init__(self, message: str, points: tuple[CommitId | None, ...]) -> None:
        super().__init__(message)
        self.points = points

    @property
    def point(self) -> CommitId | None:
        """Of the first session: of the only one, where one session generated."""
        return self.points[0] if self.points else None


class EngineWork:
    """A prefill or a generation under way. `generates`: a drain cancels it at the next token; a prefill it awaits."""

    def __init__(self, handle: Handle[Any], refs: Sequence[SessionRef], *, generates: bool) -> None:
        self.handle, self.refs, self.generates = handle, tuple(refs), generates
        self.interrupted = False
        """A drain has cancelled it. Where it ended by itself just before, nothing was cut short."""
        self._points: dict[SessionRef, CommitId] = {}
        self._why = ""
        self._captured = threading.Event()

    def interrupt(self) -> None:
        self.interrupted = True
        self.handle.cancel()

    def captured(self, points: Mapping[SessionRef, CommitId], why: str) -> None:
        """The drain is over. `why`: what is said of sessions without a point."""
        self._points, self._why = dict(points), why
        self._captured.set()

    def check(self, done: Sequence[Completion], timeout: float | None = None) -> None:
        """Raise `Drained` where a drain cut it short; waits until its sessions are captured."""
        if not self.interrupted or not any(one.finish_reason == "abort" for one in done):
            return
        self._captured.wait(timeout)
        points = tuple(self._points.get(ref) for ref in self.refs)
        raise Drained(_way_on(points, self._why), points)


def _way_on(points: Sequence[CommitId | None], why: str) -> str:
    named = [short(point, 16) for point in points if point is not None]
    lost = len(points) - len(named)
    told = f"the engine was drained while this was generated. {len(named)} of {len(points)} sessions were stored"
    if named:
        told += f"; to go on, open a point and resume it: repo.session({named[0]!r}).resume()"
    return told + (f". Not stored: {lost} ({why})" if lost else "")


class Asleep(msgspec.Struct, frozen=True, kw_only=True):
    """`points`: the sessions whose KV the engine dropped (weakly), and where each continues."""

    points: tuple[tuple[weakref.ref[Any], CommitId], ...]


class Admission:
    """Safe from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sessions: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._next = 0
        self._works: dict[int, EngineWork] = {}
        self._beginning = 0
        self._closed = ""
        self.asleep: Asleep | None = None
        """What is to be loaded again once the engine wakes; None while it does not sleep."""

    # -- sessions

    def enter(self, session: object) -> None:
        with self._changed:
            self._sessions[self._next] = session
            self._next += 1

    def sessions(self) -> list[Any]:
        """Those that somebody holds, oldest first; closed ones too, until they are forgotten."""
        with self._changed:
            return [session for _, session in sorted(self._sessions.items())]

    # -- work

    @property
    def closed(self) -> str:
        """Why nothing may begin; "" where it may."""
        return self._closed

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Around what begins something. Raises `Busy` while the door is closed."""
        with self._changed:
            self._require_open()
            self._beginning += 1
        try:
            yield
        finally:
            with self._changed:
                self._beginning -= 1
                self._changed.notify_all()

    def _require_open(self) -> None:
        if self._closed:
            raise Busy(
                f"the engine is drained ({self._closed}): nothing new begins until {self._way_back}. Sessions can be "
                f"read{'' if self.asleep else ' and committed'} meanwhile."
            )

    @property
    def _way_back(self) -> str:
        return "repo.undrain()" if self.asleep is None else "repo.wake()"

    def track(self, handle: Handle[T], refs: Sequence[SessionRef], *, generates: bool) -> EngineWork:
        """Note work that has begun, until it ends."""
        work = EngineWork(handle, refs, generates=generates)
        with self._changed:
            self._works[id(work)] = work
        handle.add_done_callback(lambda _: self._ended(work))
        return work

    def _ended(self, work: EngineWork) -> None:
        with self._changed:
            self._works.pop(id(work), None)
            self._changed.notify_all()

    def works(self) -> list[EngineWork]:
        with self._changed:
            return list(self._works.values())

    # -- the door

    def close(self, why: str) -> None:
        """Let nothing begin any more. Raises `Busy` where it is closed already."""
        with self._changed:
            if self._closed:
                raise Busy(f"the engine is drained already ({self._closed}); {self._way_back} opens it again")
            self._closed = why or "drain"

    def open(self) -> bool:
        """Let work begin again; whether it was closed. Raises `Busy` where the engine sleeps."""
        with self._changed:
            if self.asleep is not None:
                raise Busy("the engine is asleep; repo.wake() lets work begin again")
            was, self._closed = bool(self._closed), ""
            return was

    def settle(self, timeout_s: float) -> bool:
        """Wait until nothing is beginning and nothing is under way; False where that takes longer."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._beginning and not self._works, max(0.0, deadline - time.monotonic())
            )

    def begun(self, timeout_s: float) -> bool:
        """Wait until nothing is beginning; False where that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._beginning, timeout_s)
