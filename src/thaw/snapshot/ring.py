"""Checkpoints by themselves, every so many tokens or seconds: the last few, and no history.

They lie in a repository of their own, beside the one that the sessions commit to (`checkpoints/` in its folder): no
branch, log or reflog of anybody's has them, and gc there keeps the ring alone. After `kill -9` the newest one that can
be read is restored: of what was given out, at most `tokens` tokens and those of one capture in flight are generated
again, and they are the same.
"""

from __future__ import annotations

import threading
import time
import weakref
from pathlib import Path

from thaw.core.errors import Conflict, Damaged, InvalidRequest, NotFound, ThawError
from thaw.core.objects import Commit, Turn
from thaw.engines.base import Policy
from thaw.repo import commit as commits
from thaw.repo.context import Context
from thaw.repo.kept import Kept
from thaw.repo.repository import Repository
from thaw.repo.session import Session
from thaw.snapshot import manifest, take
from thaw.snapshot.manifest import EngineSnapshot
from thaw.snapshot.queue import RequestQueue
from thaw.snapshot.request import QueuedRequest
from thaw.snapshot.restoring import RestoredEngine, restore
from thaw.snapshot.take import CapturedSession
from thaw.store import Store

FOLDER = "checkpoints"
KEEP = 2
DEFAULT_TOKENS = 64
MAX_KEEP = 64


class CheckpointRing:
    """Checkpoints of a queue's engine, from a thread of its own, until `close`; leaving its `with` closes it.

    `tokens`: at most so many of a request are generated before a checkpoint is begun; `seconds`: at most so long while
    something runs. `keep`: how many are kept, so that one that is damaged has an older one behind it.
    """

    def __init__(
        self,
        queue: RequestQueue,
        *,
        tokens: int | None = DEFAULT_TOKENS,
        seconds: float | None = None,
        keep: int = KEEP,
    ) -> None:
        if tokens is None and seconds is None:
            raise InvalidRequest("a checkpoint every so many tokens or seconds: give one of the two, or both")
        if (tokens is not None and tokens < 1) or (seconds is not None and not 0.01 <= seconds <= 86_400):
            raise InvalidRequest(f"tokens={tokens}, seconds={seconds}: at least 1 token, 0.01 to 86,400 seconds")
        if not 1 <= keep <= MAX_KEEP:
            raise InvalidRequest(f"keep={keep}: how many checkpoints to keep, 1 to {MAX_KEEP}")
        self._queue, self._tokens, self._seconds, self._keep = queue, tokens, seconds, keep
        self._store = _opened(queue.repo, make=True)
        self._context = Context(self._store, queue.repo.engine)
        self._kept: weakref.WeakKeyDictionary[Session, Kept] = weakref.WeakKeyDictionary()
        self._before: weakref.WeakKeyDictionary[Session, tuple[int, tuple[Turn, ...], CapturedSession]] = (
            weakref.WeakKeyDictionary()
        )
        self._at: dict[str, int] = {}
        self.number = 0
        """How many were written."""
        self.error: ThawError | None = None
        """Why the last one was not written; the next one is tried all the same."""
        self._changed = threading.Condition()
        self._writing = threading.Lock()
        self._due = self._closed = False
        queue.on_tokens = self._told
        self._thread = threading.Thread(target=self._work, name="thaw-checkpoints", daemon=True)
        self._thread.start()

    def checkpoint(self) -> EngineSnapshot:
        """Write one now. Durable when it returns. Raises `InvalidRequest` where nothing is live."""
        with self._writing:
            try:
                return self._write()
            except Conflict:  # something that was known is not stored any more
                self._before.clear()
                return self._write()

    def _write(self) -> EngineSnapshot:
        repo, queue = self._queue.repo, self._queue
        requests = take.requests_of(queue)
        begun = {one.id: one.num_tokens for one in requests.values() if not one.ended}
        with self._changed:
            self._at = begun
        captured, missed = take.capture_all(take.own_sessions(repo), requests, self._capture)
        if not captured and not missed:
            raise InvalidRequest("no session is live; there is nothing to keep")
        entries = take.entries_of(self._store, captured, requests)
        record = take.record_of(repo, queue, len(entries), missed)
        name = _names(self._keep)[self.number % self._keep]
        done = manifest.write(self._store, name, repo.engine.identity(), record, entries, replace=True)
        self.number += 1
        if self.number % self._keep == 0:
            self._store.gc(keep_reflog_s=0.0)
        return done

    def _capture(self, session: Session) -> CapturedSession:
        """What has not changed since the last time is not captured again."""
        view = session.view()
        known = self._before.get(session)
        if known is not None and (known[0], known[1]) == (len(view.tokens), view.turns):
            return CapturedSession(session, view, known[2].commit)
        request = commits.Request(
            session=session.ref, parent=None, message="checkpoint", branch=None, meta={}, expect="any",
            reason="checkpoint",
        )  # fmt: skip
        done = commits.write(self._context, request, self._kept.get(session, Kept()))
        self._kept[session] = done.kept
        if view.parked:
            session.park()
        found = CapturedSession(session, view, done.result.commit)
        self._before[session] = (len(done.captured.tokens), done.captured.turns, found)
        return found

    # -- when

    def _told(self, request: QueuedRequest) -> None:
        if self._tokens is None:
            return
        with self._changed:
            if not self._due and request.num_tokens - self._at.get(request.id, 0) >= self._tokens:
                self._due = True
                self._changed.notify_all()

    def _work(self) -> None:
        while self._wait():
            try:
                self.checkpoint()
                self.error = None
            except InvalidRequest:
                continue  # nothing is live
            except ThawError as error:
                self.error = error
                time.sleep(0.05)

    def _wait(self) -> bool:
        """Until one is due; False at the end."""
        with self._changed:
            while not self._closed and not self._due:
                due = self._changed.wait(self._seconds)
                if not due and self._seconds is not None and self._queue.requests():
                    break
            self._due = False
            return not self._closed

    def close(self) -> None:
        """Write no more; those that were written stay. Closing twice is fine."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._queue.on_tokens = lambda _: None
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._store.close()

    def __enter__(self) -> CheckpointRing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def newest(repo: Repository) -> list[EngineSnapshot]:
    """The checkpoints of `repo`'s namespace that can be read, newest first. Raises `NotFound` where there is none."""
    with _opened(repo, make=False) as store:
        return _readable(store)


def restore_checkpoint(
    repo: Repository, *, fork: bool = False, max_num_seqs: int | None = None, policy: Policy = "exact"
) -> RestoredEngine:
    """Restore the newest checkpoint that can be read, as `restore`; an older one only where the newer are damaged.

    Raises `NotFound`, `Conflict` where it was restored already, and what `restore` raises."""
    with _opened(repo, make=False) as store:
        found = _readable(store)
        for i, one in enumerate(found):
            try:
                return restore(repo, one.name, fork=fork, max_num_seqs=max_num_seqs, policy=policy, source=store)
            except Damaged:
                if i + 1 == len(found):
                    raise
    raise NotFound(f"no checkpoint in {_folder(repo)} can be read")


def _readable(store: Store) -> list[EngineSnapshot]:
    found = []
    for ref in store.refs("branch"):
        try:
            found.append(manifest.read(store, ref.name))
        except Damaged:
            continue
    if not found:
        raise NotFound(f"no checkpoint in {store.path} can be read")
    return sorted(found, key=lambda one: -_time_ns(store, one))


def _time_ns(store: Store, found: EngineSnapshot) -> int:
    return int(store.get_as(found.commit, Commit).time_ns)


def _names(keep: int) -> list[str]:
    return [f"ring/{i}" for i in range(keep)]


def _folder(repo: Repository) -> Path:
    return repo.path / FOLDER


def _opened(repo: Repository, *, make: bool) -> Store:
    """The ring's own store, in `repo`'s namespace."""
    folder = _folder(repo)
    try:
        store = Store.open(folder)
    except NotFound:
        if not make:
            raise NotFound(f"there are no checkpoints of {repo.path}; a CheckpointRing writes them") from None
        try:
            store = Store.init(folder)
        except Conflict:
            store = Store.open(folder)
    return store.within(repo.namespace) if repo.namespace else store
