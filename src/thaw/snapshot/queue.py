"""The queue of an engine: at most so many requests run, the others wait their turn.

Requests run in order of priority (a lower number first, as in vLLM), then of arrival. Each is a batch of its own, so on
an engine with `own-batch` its bits do not depend on what else runs, before a restore or after it. The queue knows what
has been given out of each, and with its sessions it is what a snapshot of an engine holds.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence

from thaw.core.errors import Busy, EngineDied, InvalidRequest, NotFound, ThawError, TimedOut
from thaw.repo.admission import Drained
from thaw.repo.drain import DEFAULT_TIMEOUT_S, DrainReport
from thaw.repo.params import as_sampling
from thaw.repo.repository import Repository
from thaw.repo.session import Session
from thaw.snapshot.request import QueuedRequest

DEFAULT_NUM_SEQS = 256
"""Requests that run at a time; vLLM's default."""
MAX_ID = 200


class RequestQueue:
    """Requests of one repository's sessions. Leaving its `with` closes it; the sessions stay open."""

    def __init__(self, repo: Repository, *, max_num_seqs: int = DEFAULT_NUM_SEQS) -> None:
        if not 1 <= max_num_seqs <= 1 << 16:
            raise InvalidRequest(f"max_num_seqs={max_num_seqs}: a number of requests, 1 to {1 << 16}")
        self.repo, self.max_num_seqs = repo, max_num_seqs
        self._changed = threading.Condition()
        self._requests: dict[str, QueuedRequest] = {}
        self._running: set[str] = set()
        self._next_number = 0
        self._held = False
        self._closed = False
        self.on_tokens: Callable[[QueuedRequest], None] = lambda _: None
        """Told after each piece of news, from the request's own thread."""
        self._starter = threading.Thread(target=self._start_all, name="thaw-queue", daemon=True)
        self._starter.start()

    # -- asking

    def submit(
        self,
        session: Session,
        prompt: str = "",
        sampling: object = None,
        *,
        token_ids: Sequence[int] | None = None,
        id: str | None = None,
        priority: int = 0,
    ) -> QueuedRequest:
        """Append the prompt, if any, and generate, when it is its turn. `id`: by which it is found again, also after a
        restore; default: a new one. Raises `Busy` where the session has a request already, `InvalidRequest`."""
        params = as_sampling(sampling)
        if session.namespace != self.repo.namespace or not self.repo.commits_of(session):
            raise InvalidRequest("the session commits to another repository or namespace; it needs a queue of its own")
        ids, _ = session.encode(prompt, token_ids)
        if not ids and not session.num_tokens:
            raise InvalidRequest("the session is empty and so is the prompt; give one")
        name = secrets.token_hex(8) if id is None else id
        request = QueuedRequest(name, session, ids, params, start=session.num_tokens + len(ids), priority=priority)
        self.add(request)
        return request

    def add(self, request: QueuedRequest) -> None:
        """One that is made already; it arrives now unless it has a number. Raises as `submit`."""
        if not 1 <= len(request.id) <= MAX_ID or not request.id.isprintable():
            raise InvalidRequest(f"id={request.id[:40]!r}: 1 to {MAX_ID} printable characters")
        with self._changed:
            if self._closed:
                raise InvalidRequest("the queue is closed; make another one")
            if request.id in self._requests:
                raise Busy(f"there is a request {request.id!r} in this queue already; choose another id")
            if any(one.session is request.session and not one.ended for one in self._requests.values()):
                raise Busy("the session has a request that has not ended; wait for it, or fork the session")
            request.number = request.number or self._next_number + 1
            self._next_number = max(self._next_number, request.number)
            self._requests[request.id] = request
            request.on_change = self._notify
            self._changed.notify_all()

    def request(self, id: str) -> QueuedRequest:
        """By its id, ended or not. Raises `NotFound`."""
        with self._changed:
            found = self._requests.get(id)
        if found is None:
            raise NotFound(f"there is no request {id!r} in this queue")
        return found

    def requests(self) -> list[QueuedRequest]:
        """Those that have not ended: what runs, then what waits, each in its order."""
        with self._changed:
            left = [one for one in self._requests.values() if not one.ended]
        return sorted(left, key=lambda one: (one.status == "waiting", *_order(one)))

    def known(self) -> list[QueuedRequest]:
        """All that were not forgotten, ended or not, in order of arrival."""
        with self._changed:
            return sorted(self._requests.values(), key=lambda one: one.number)

    def forget(self, id: str) -> None:
        """Let go of one that has ended. Raises `Busy` where it has not."""
        if not self.request(id).ended:
            raise Busy(f"request {id!r} has not ended; cancel it first")
        with self._changed:
            self._requests.pop(id, None)

    def wait(self, timeout: float | None = None) -> bool:
        """Until all have ended; False where that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: all(one.ended for one in self._requests.values()), timeout)

    # -- draining

    def drain(self, *, timeout_s: float = DEFAULT_TIMEOUT_S, why: str = "drain") -> DrainReport:
        """As `Repository.drain`; requests that run are interrupted and, as those that wait, go on after `undrain`."""
        with self._changed:
            self._held = True
        try:
            report = self.repo.drain(timeout_s=timeout_s, why=why)
        except ThawError:
            self.release()
            raise
        with self._changed:
            self._changed.wait_for(lambda: not self._running, timeout_s)
        return report

    def undrain(self) -> bool:
        """Go on; False where nothing was drained."""
        was = self.repo.undrain()
        self.release()
        return was

    def hold(self) -> None:
        """Start nothing until `release`."""
        with self._changed:
            self._held = True

    def release(self) -> None:
        with self._changed:
            self._held = False
            for one in self._requests.values():
                one.resume()
            self._changed.notify_all()

    def stop(self, request: QueuedRequest | None) -> None:
        """Stop it at the next token, as a drain does, or let it wait no longer: it is in nobody's hands afterwards.
        Raises what ended it meanwhile, `TimedOut`."""
        if request is None:
            return
        with self._changed:
            if request.status == "waiting" and request.id not in self._running:
                request.interrupt()
                return
        request.stop()
        with self._changed:
            if not self._changed.wait_for(lambda: request.id not in self._running, DEFAULT_TIMEOUT_S):
                raise TimedOut(f"request {request.id} did not stop within {DEFAULT_TIMEOUT_S:g} s")

    def go_on(self, request: QueuedRequest | None) -> None:
        """As before `stop`."""
        with self._changed:
            if request is not None:
                request.resume()
            self._changed.notify_all()

    def remove(self, request: QueuedRequest) -> None:
        """Let go of one that does not run: it goes on elsewhere."""
        with self._changed:
            self._requests.pop(request.id, None)
            self._changed.notify_all()

    def close(self) -> None:
        """Cancel what runs and waits, and end. Closing twice is fine."""
        with self._changed:
            self._closed = True
            left = [one for one in self._requests.values() if not one.ended]
            self._changed.notify_all()
        for one in left:
            one.cancel()
        self._starter.join()
        with self._changed:
            self._changed.wait_for(lambda: not self._running, DEFAULT_TIMEOUT_S)

    def __enter__(self) -> RequestQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<RequestQueue of {self.repo.path}, {len(self._running)} running>"

    # -- running

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _start_all(self) -> None:
        while (request := self._take_next()) is not None:
            threading.Thread(target=self._run, args=[request], name="thaw-request", daemon=True).start()

    def _take_next(self) -> QueuedRequest | None:
        """The next one to run, once there is room; None at the end."""
        with self._changed:
            while not self._closed:
                waiting = [one for one in self._requests.values() if one.status == "waiting"]
                open_ = not self._held and not self.repo.is_drained
                if waiting and open_ and len(self._running) < self.max_num_seqs:
                    request = min((one for one in waiting if one.id not in self._running), key=_order, default=None)
                    if request is not None:
                        self._running.add(request.id)
                        return request
                self._changed.wait()
        return None

    def _tell(self, request: QueuedRequest) -> None:
        """To whom it is told by now."""
        self.on_tokens(request)

    def _run(self, request: QueuedRequest) -> None:
        try:
            request.finish(request.follow(request.begin(), self._tell))
        except Drained:
            request.interrupt()
        except Busy as error:
            if self._held or self.repo.is_drained:
                request.interrupt()
            else:
                request.fail(error)
        except ThawError as error:
            request.fail(error)
        except BaseException as error:
            request.fail(EngineDied(f"request {request.id} failed: {type(error).__name__}: {error}"))  # not begun again
            raise
        finally:
            with self._changed:
                self._running.discard(request.id)
                self._changed.notify_all()


def _order(request: QueuedRequest) -> tuple[int, int]:
    return request.priority, request.number
