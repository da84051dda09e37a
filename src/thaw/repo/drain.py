"""Drain: nothing new begins, and every live session is stored, at a token boundary.

    close the door      what would begin is refused with `Busy`
    interrupt           generations stop at the next token; prefills are awaited (for at most half of the time limit)
    capture             every session, on no branch: branches stay where they are
    answer              the points, and by name what was not captured

The call before a deploy and before a weight update. Nothing is captured halfway: a session has a point or is among the
missed ones. Sessions stay open, and `undrain` lets them continue; a completion that was cut short is resumed.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from thaw.core.errors import InvalidRequest, ThawError
from thaw.core.ids import CommitId
from thaw.engines.base import SessionRef, SessionView
from thaw.repo.admission import Admission, EngineWork
from thaw.repo.commit import CommitResult

CAPTURES = 4
"""Sessions that are captured at a time."""
STALL_S = 0.5
"""Where no capture has ended for so long, the engine is asked whether its owner has stopped it."""
MAX_TIMEOUT_S = 86_400.0
DEFAULT_TIMEOUT_S = 60.0


class OpenSession(Protocol):
    """A session, as far as it is drained."""

    @property
    def ref(self) -> SessionRef: ...
    @property
    def namespace(self) -> str: ...
    def view(self) -> SessionView: ...
    def park(self) -> SessionView: ...
    def committed(self) -> CommitResult | None: ...
    def snapshot(self, message: str = "", meta: Mapping[str, str] | None = None) -> CommitResult: ...


class DrainedSession(msgspec.Struct, frozen=True, kw_only=True):
    """A session that was captured. `was`: what it did when the drain began; of one that was `running` the last turn may
    be unfinished, and `resume` continues with it."""

    session: SessionRef
    namespace: str
    point: CommitId
    num_tokens: int
    was: Literal["running", "parked", "idle"]


class MissedSession(msgspec.Struct, frozen=True, kw_only=True):
    session: SessionRef
    namespace: str
    why: str


class DrainReport(msgspec.Struct, frozen=True, kw_only=True):
    """`num_empty`: sessions without a token, of which there is nothing to keep."""

    points: tuple[DrainedSession, ...]
    missed: tuple[MissedSession, ...]
    num_empty: int
    seconds: float

    @property
    def complete(self) -> bool:
        return not self.missed

    def point(self, session: SessionRef) -> CommitId | None:
        """Where that session can be continued from."""
        return next((one.point for one in self.points if one.session == session), None)


def drain(admission: Admission, timeout_s: float, why: str, stalled: Callable[[], str] = lambda: "") -> DrainReport:
    """See the module. `stalled`: why the engine captures nothing now, if it says so; nobody waits for it then.
    Afterwards the door stays closed. Raises `Busy` where it is closed already."""
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequest(
            f"timeout_s={timeout_s}: a number of seconds, more than 0 and at most {MAX_TIMEOUT_S:,.0f}"
        )
    started = time.monotonic()
    admission.close(why)
    admission.begun(timeout_s / 2)
    works = admission.works()
    cut_short = [work for work in works if work.generates]
    for work in cut_short:
        work.interrupt()
    admission.settle(max(0.0, timeout_s / 2 - (time.monotonic() - started)))
    busy = {ref for work in works for ref in work.refs}
    report = _Captures(admission.sessions(), busy, started, timeout_s, stalled).run()
    _tell(cut_short, report)
    return report


def _tell(works: Sequence[EngineWork], report: DrainReport) -> None:
    """Let those who wait for what was cut short know where it can be continued from."""
    points = {one.session: one.point for one in report.points}
    reasons = {one.session: one.why for one in report.missed}
    for work in works:
        why = next((reasons[ref] for ref in work.refs if ref in reasons), "the session was closed meanwhile")
        work.captured(points, why)


class _Captures:
    """Several captures at a time, on threads that end with the process: an engine that hangs holds nobody up."""

    def __init__(
        self,
        sessions: Sequence[OpenSession],
        busy: set[SessionRef],
        started: float,
        timeout_s: float,
        stalled: Callable[[], str],
    ) -> None:
        self._busy, self._started, self._timeout_s, self._stalled = busy, started, timeout_s, stalled
        self._why = f"not captured within {timeout_s:g} s"
        self._lock = threading.Lock()
        self._ended, self._num_working = threading.Event(), CAPTURES
        self._over = False
        self._todo: queue.SimpleQueue[tuple[SessionRef, OpenSession]] = queue.SimpleQueue()
        self._points: dict[SessionRef, DrainedSession] = {}
        self._missed: dict[SessionRef, MissedSession] = {}
        self._empty: set[SessionRef] = set()
        self._waiting: dict[SessionRef, str] = {}
        for session in sessions:
            with contextlib.suppress(InvalidRequest):  # closed
                self._waiting[session.ref] = session.namespace
                self._todo.put((session.ref, session))

    def run(self) -> DrainReport:
        for work in (*[self._work] * CAPTURES, self._watch):
            threading.Thread(target=work, name="thaw-drain", daemon=True).start()
        self._ended.wait(max(0.0, self._started + self._timeout_s - time.monotonic()))
        with self._lock:
            self._over = True
            order = list(self._waiting)
            late = {ref for ref in order if ref not in self._points and ref not in self._missed}
            for ref in late - self._empty:
                self._missed[ref] = MissedSession(session=ref, namespace=self._waiting[ref], why=self._why)
            return DrainReport(
                points=tuple(self._points[ref] for ref in order if ref in self._points),
                missed=tuple(self._missed[ref] for ref in order if ref in self._missed),
                num_empty=len(self._empty),
                seconds=time.monotonic() - self._started,
            )

    def _watch(self) -> None:
        """Nobody waits for an engine that its owner has stopped."""
        before = -1
        while not self._ended.wait(STALL_S):
            with self._lock:
                done = len(self._points) + len(self._missed) + len(self._empty)
            if done == before:
                with contextlib.suppress(ThawError):
                    if why := self._stalled():
                        self._why = f"not captured: {why}"
                        self._ended.set()
            before = done

    def _work(self) -> None:
        try:
            while True:
                self._capture_next()
        except queue.Empty:
            pass
        finally:
            with self._lock:
                self._num_working -= 1
                if not self._num_working:
                    self._ended.set()

    def _capture_next(self) -> None:
        """Raises `queue.Empty`."""
        ref, session = self._todo.get_nowait()
        try:
            self._capture(ref, session)
        except ThawError as error:
            self._note(MissedSession(session=ref, namespace=self._waiting[ref], why=f"{error.kind}: {error}"))

    def _capture(self, ref: SessionRef, session: OpenSession) -> None:
        view = session.view()
        if not view.tokens:
            with self._lock:
                self._empty.add(ref)
            return
        done = session.committed() or session.snapshot("drained")
        if view.parked:
            session.park()
        self._note(
            DrainedSession(
                session=ref,
                namespace=self._waiting[ref],
                point=done.commit,
                num_tokens=done.num_tokens,
                was="running" if ref in self._busy else "parked" if view.parked else "idle",
            )
        )

    def _note(self, what: DrainedSession | MissedSession) -> None:
        with self._lock:
            if self._over:
                return
            if isinstance(what, DrainedSession):
                self._points[what.session] = what
            else:
                self._missed[what.session] = what
