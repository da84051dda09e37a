"""gc of a remote: deletes data that no ref and no recent entry of a reflog reaches. In two runs, a grace period apart.

    first run    mark: data is listed, refs and reflogs are read and followed. What is not reached, and is older than
                 the grace period by the store's own clock, is written down (`condemned`); a new epoch begins
    second run   sweep: announced in gc's state; every ref is rewritten, which ends each move that read it before;
                 marked again; what of the list still is not reached is deleted

A push that begins while the list is swept builds on nothing in it, and what is deleted is never written again under the
same name. Names come from listings here, and here alone. Killed at any point gc leaves every ref whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import msgspec

from thaw.core.errors import Busy, CorruptBlob
from thaw.remote import epochs, layout, refs, values
from thaw.remote.bucket import ListedObject, Version
from thaw.remote.epochs import GcState
from thaw.remote.history import walk
from thaw.remote.layout import Kind
from thaw.remote.opened import OpenedRemote
from thaw.remote.parallel import SMALL_REQUESTS, mapped
from thaw.remote.refs import RemoteRef
from thaw.remote.report import RemoteGcReport

GRACE_S = 24 * 3600.0
KEEP_REFLOG_S = 90 * 24 * 3600.0
DELETED_AT_A_TIME = 500


class GcWish(NamedTuple):
    """`grace_s`: how old data must be to be condemned, and how long it is condemned before it is deleted."""

    grace_s: float = GRACE_S
    keep_reflog_s: float = KEEP_REFLOG_S
    dry_run: bool = False
    workers: int = SMALL_REQUESTS


class _Marks(NamedTuple):
    """What roots reach, and the data that there is."""

    live: frozenset[str]
    there: dict[str, ListedObject]


def collect(remote: OpenedRemote, wish: GcWish = GcWish()) -> RemoteGcReport:  # noqa: B008 - a value
    """One run. Where a list waits whose grace period is over, it is swept; where none waits, one is written.

    Raises `Busy` where another gc is first, `CorruptBlob` where something that a ref needs is missing: then nothing is
    deleted.
    """
    return _RemoteGc(remote, wish).run()


class _RemoteGc:
    def __init__(self, remote: OpenedRemote, wish: GcWish) -> None:
        self.remote, self.bucket, self.wish = remote, remote.bucket, wish
        self._writer = ""  # of the last state that this one wrote
        self.report = RemoteGcReport(
            remote=remote.name, phase="done", epoch=0, num_live=0, num_condemned=0, condemned_nbytes=0, num_deleted=0,
            deleted_nbytes=0, num_reflog_deleted=0, seconds_to_wait=0.0, dry_run=wish.dry_run,
        )  # fmt: skip

    def run(self) -> RemoteGcReport:
        state, version = epochs.read(self.bucket)
        try:
            self._run(state, version)
        except CorruptBlob:
            if epochs.read(self.bucket)[0].writer in (state.writer, self._writer):
                raise
            raise self._busy() from None
        return self.report

    def _run(self, state: GcState, version: Version | None) -> None:
        left = max(0.0, state.since + self.wish.grace_s - self.bucket.now()) if state.phase == "waiting" else 0.0
        if left:
            self._say(phase="waiting", epoch=state.epoch, seconds_to_wait=left)
            self._say(num_condemned=len(epochs.read_list(self.bucket, state)))
        elif self.wish.dry_run:
            self._predict(state)
        elif state.phase == "done":
            self._condemn(state, version)
        else:
            self._sweep(state, version)

    def _say(self, **fields: object) -> None:
        self.report = msgspec.structs.replace(self.report, **fields)

    # -- the two runs

    def _condemn(self, state: GcState, version: Version | None) -> None:
        since = self.bucket.now()
        marks = self._mark(self._read_refs)
        gone = self._candidates(marks, since)
        self._say(num_live=len(marks.live))
        if not gone:
            self._drop_reflogs()
            self._say(epoch=state.epoch)
            return
        epoch = state.epoch + 1
        new = GcState(
            epoch=epoch, phase="waiting", condemned=epochs.write_list(self.bucket, epoch, gone),
            since=self.bucket.now(), sweep=state.sweep, writer=values.nonce(),
        )  # fmt: skip
        self._write(new, version)
        nbytes = sum(marks.there[key].size for key in gone)
        self._say(
            phase="waiting",
            epoch=epoch,
            num_condemned=len(gone),
            condemned_nbytes=nbytes,
            seconds_to_wait=self.wish.grace_s,
        )

    def _sweep(self, state: GcState, version: Version | None) -> None:
        condemned = epochs.read_list(self.bucket, state)
        sweeping = msgspec.structs.replace(state, phase="sweeping", sweep=state.sweep + 1, writer=values.nonce())
        version = self._write(sweeping, version)
        marks = self._mark(lambda: self._fence(sweeping.sweep))
        gone = sorted(key for key in condemned if key in marks.there and key not in marks.live)
        if epochs.read(self.bucket)[0].writer != sweeping.writer:
            raise self._busy()
        self._delete(gone)
        self._drop_reflogs()
        self._drop_lists(state)
        self._write(msgspec.structs.replace(sweeping, phase="done", writer=values.nonce()), version)
        self._say(
            phase="done", epoch=state.epoch, num_live=len(marks.live), num_condemned=len(condemned),
            num_deleted=len(gone), deleted_nbytes=sum(marks.there[key].size for key in gone),
        )  # fmt: skip

    def _predict(self, state: GcState) -> None:
        marks = self._mark(self._read_refs)
        gone = self._candidates(marks, self.bucket.now())
        nbytes = sum(marks.there[key].size for key in gone)
        self._say(
            phase=state.phase,
            epoch=state.epoch,
            num_live=len(marks.live),
            num_condemned=len(gone),
            condemned_nbytes=nbytes,
        )

    def _write(self, state: GcState, version: Version | None) -> Version:
        self._writer = state.writer
        done = epochs.write(self.bucket, state, version)
        if done is None:
            raise self._busy()
        return done

    def _busy(self) -> Busy:
        return Busy(f"another gc is running in {self.remote.url}. Try again when it is done.")

    # -- marking

    def _read_refs(self) -> list[RemoteRef]:
        return [standing.ref for standing in refs.read_listed(self.bucket, self.wish.workers).values()]

    def _fence(self, number: int) -> list[RemoteRef]:
        named: list[tuple[Kind, str]] = [
            (kind, name) for kind in layout.KINDS for name in refs.names(self.bucket, kind)
        ]
        done = mapped(lambda one: refs.fence(self.bucket, *one, number), named, self.wish.workers)
        return [ref for ref in done if ref is not None]

    def _mark(self, read_roots: Callable[[], list[RemoteRef]]) -> _Marks:
        """Data is listed before refs are read: what comes later is not in the list, and cannot be condemned."""
        there = {
            entry.key: entry
            for folder in (layout.MANIFESTS, layout.PACKS)
            for entry in self.bucket.entries(folder)
            if layout.is_data_key(entry.key)
        }
        roots = [(ref.commit, ref.manifest) for ref in (*read_roots(), *self._kept(there))]
        tips = [(commit, key) for commit, key in roots if commit is not None and key is not None]
        live: set[str] = set()
        for key, one in walk(self.bucket, self.bucket.namespace, tips, self.wish.workers):
            live.add(key)
            live.update(pack.key for pack in one.packs)
        return _Marks(frozenset(live), there)

    def _candidates(self, marks: _Marks, now: float) -> list[str]:
        """Data that is not reached, and old enough."""
        return sorted(
            key
            for key, entry in marks.there.items()
            if key not in marks.live and entry.modified <= now - self.wish.grace_s
        )

    def _kept(self, there: Collection[str]) -> list[RemoteRef]:
        """What refs said before, as far back as reflogs are kept. An entry that was written late, after what it names
        was forgotten (`forget.py`), keeps nothing."""
        since = self.bucket.now() - self.wish.keep_reflog_s
        keys = [entry.key for entry in self.bucket.entries(layout.REFLOG) if entry.modified > since]
        found = [ref for ref in mapped(self._entry, keys, self.wish.workers) if ref is not None]
        return [ref for ref in found if ref.manifest in there or self._is_there(ref.manifest)]

    def _is_there(self, manifest: str | None) -> bool:
        return manifest is not None and self.bucket.size(manifest) is not None

    def _entry(self, key: str) -> RemoteRef | None:
        found = self.bucket.read(key)
        return None if found is None else values.decode(found.data, RemoteRef, f"{key} of the remote")

    # -- deleting

    def _delete(self, keys: list[str]) -> None:
        """Manifests first: nothing that is left names what is gone."""
        for begin in range(0, len(keys), DELETED_AT_A_TIME):
            self.bucket.delete(keys[begin : begin + DELETED_AT_A_TIME])

    def _drop_reflogs(self) -> None:
        since = self.bucket.now() - self.wish.keep_reflog_s
        old = [entry.key for entry in self.bucket.entries(layout.REFLOG) if entry.modified <= since]
        self._delete(old)
        self._say(num_reflog_deleted=len(old))

    def _drop_lists(self, state: GcState) -> None:
        """Lists of epochs that are over. This one may be late itself: newer lists are not its own."""
        lists = [entry.key for entry in self.bucket.entries(layout.CONDEMNED)]
        self._delete([key for key in lists if epochs.is_older_list(key, state.epoch)])
