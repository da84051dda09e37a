"""A bucket in an object store (S3, Azure Blob Storage, Google Cloud Storage), through obstore.

Reads and data are retried by obstore itself. Conditional writes are not: a retry after a lost answer would be refused
because of our own first write, and look like somebody else's. They are tried one request at a time here, and what
became of one whose answer was lost is read back. Shared by threads; nothing is stored on this host.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore.exceptions import BaseError

from thaw.core.errors import RemoteError, RemoteMissing, RemoteUncertain
from thaw.remote.bucket import CLOCK, FoundObject, ListedObject, Version, check_key, is_key
from thaw.remote.errors import REPAIR, Failure, remote_error
from thaw.remote.retry import ATTEMPTS, PATIENCE, attempts

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")

PART = 8 << 20
"""Bytes of one part of a larger object, and the most that one request takes up."""
PARTS_AT_ONCE = 6
GAP = 1 << 20
"""Ranges that lie closer together are read by one request."""
READERS = 8
_FAILURES = (BaseError, OSError, ValueError)
"""What obstore raises: its own errors, `FileNotFoundError`, `ValueError`."""


class ObjectBucket:
    """A `Bucket` under `prefix` ("" or "a/b") of the stores that `make` gives: `make(0)` never retries."""

    def __init__(self, url: str, prefix: str, make: Callable[[int], ObjectStore], *, timeout_s: float) -> None:
        self._url, self._prefix, self._timeout_s = url, f"{prefix}/" if prefix else "", timeout_s
        self._store, self._once = make(ATTEMPTS - 1), make(0)

    @property
    def url(self) -> str:
        return self._url

    def read(self, key: str) -> FoundObject | None:
        return self._asked(f"read {key}", lambda: self._read(check_key(key)))

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        if any(start < 0 or length < 0 for start, length in ranges):
            raise ValueError(f"negative start or length: {ranges}")
        check_key(key)
        runs = _runs(ranges)
        parts = (
            list(self._readers.map(lambda run: self._run(key, *run), runs))
            if len(runs) > 1
            else [self._run(key, *run) for run in runs]
        )
        return [_cut(runs, parts, start, length) for start, length in ranges]

    def size(self, key: str) -> int | None:
        def asked() -> int | None:
            return int(obstore.head(self._store, self._path(key))["size"])

        return self._asked(f"look for {key}", asked)

    def put(self, key: str, data: bytes | memoryview) -> None:
        path = self._path(key)
        whole = memoryview(data).cast("B") if len(data) else b""

        def asked() -> bool:
            obstore.put(
                self._store, path, whole,
                use_multipart=len(whole) > PART, chunk_size=PART, max_concurrency=PARTS_AT_ONCE,
            )  # fmt: skip
            return True

        self._written(self._asked(f"write {key}", asked), key)

    def create(self, key: str, data: bytes) -> Version | None:
        return self._conditional(key, data, None)

    def swap(self, key: str, data: bytes, expected: Version) -> Version | None:
        return self._conditional(key, data, expected)

    def delete(self, keys: Sequence[str]) -> None:
        paths = [self._path(key) for key in keys]
        if not paths:
            return
        try:
            obstore.delete(self._store, paths)
        except _FAILURES as error:
            if not Failure(error).missing:
                raise self._error(error, f"delete {len(paths)} objects") from None
            for path in paths:  # some stores stop at the first that is missing
                self._asked("delete an object", partial(obstore.delete, self._store, path))

    def entries(self, prefix: str) -> Iterator[ListedObject]:
        start = self._path(prefix) if prefix else self._prefix
        try:
            for chunk in obstore.list(self._store, start):
                for found in chunk:
                    key = str(found["path"]).removeprefix(self._prefix)
                    if is_key(key) and key != CLOCK:
                        yield ListedObject(key, int(found["size"]), found["last_modified"].timestamp())
        except _FAILURES as error:
            raise self._error(error, f"list {prefix or 'everything'}") from None

    def now(self) -> float:
        path = self._path(CLOCK)

        def asked() -> float:
            obstore.put(self._store, path, b"thaw reads the store's clock here\n")
            return float(obstore.head(self._store, path)["last_modified"].timestamp())

        at = self._asked("ask for the time", asked)
        if at is None:
            raise RemoteMissing(f"cannot ask {self._url} for the time: what was just written is not there")
        return at

    # One request.

    def _path(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _error(self, error: Exception, doing: str) -> RemoteError:
        return remote_error(Failure(error), doing, self._url)

    def _asked(self, doing: str, call: Callable[[], T]) -> T | None:
        """What `call` gives; None where the object is missing. Asked again is after what obstore does not retry: some
        answers that broke off, and 409."""
        last: RemoteError | None = None
        for _ in attempts(3, deadline_s=self._timeout_s):
            try:
                return call()
            except _FAILURES as error:
                failure = Failure(error)
                if failure.missing:
                    return None
                last = remote_error(failure, doing, self._url)
                if failure.broken != "decode" and not failure.conflict:
                    raise last from None
        assert last is not None
        raise last

    def _written(self, done: bool | None, key: str) -> None:
        if done is None:
            raise RemoteMissing(f"cannot write {key} at {self._url}: HTTP 404. Check the name of the bucket.")

    def _read(self, key: str) -> FoundObject:
        got = obstore.get(self._store, self._path(key))
        return FoundObject(bytes(got.bytes()), _version(got.meta))

    # Ranges.

    @cached_property
    def _readers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(READERS, "thaw-remote")

    def _run(self, key: str, start: int, end: int) -> memoryview:
        """Bytes [start, end) of an object that has them."""

        def asked() -> memoryview:
            got = obstore.get(self._store, self._path(key), options={"range": (start, end)})
            data = memoryview(got.bytes())
            if tuple(got.range) != (start, end) or len(data) != end - start:
                raise self._short(key, end, min(start + len(data), int(got.meta["size"])))
            return data.toreadonly()

        try:
            data = self._asked(f"read {key}", asked)
        except RemoteError as error:
            raise self._ends_before(key, end, error) from None
        if data is None:
            raise RemoteMissing(f"{key} is not at {self._url}. {REPAIR}")
        return data

    def _ends_before(self, key: str, end: int, error: RemoteError) -> RemoteError:
        """A start past the end is an error of its own (416), without the length."""
        if "HTTP 416" not in str(error):
            return error
        return self._short(key, end, self.size(key))

    def _short(self, key: str, end: int, size: int | None) -> RemoteMissing:
        return RemoteMissing(
            f"{key} at {self._url} ends at byte {size}, but bytes up to {end} were written: it was cut or replaced. "
            f"{REPAIR}"
        )

    # Conditional writes.

    def _conditional(self, key: str, data: bytes, expected: Version | None) -> Version | None:
        """`expected` None: only where nothing is there yet."""
        path, doing = self._path(key), f"{'create' if expected is None else 'move'} {key}"
        lost, last = False, None
        for _ in attempts(deadline_s=PATIENCE * self._timeout_s):
            try:
                done = obstore.put(self._once, path, data, mode=_mode(expected), use_multipart=False)
                return _version(done)
            except _FAILURES as error:
                failure = Failure(error)
            lost = lost or failure.transient
            last = remote_error(failure, doing, self._url)
            if not failure.leaves_it_open:
                raise _perhaps_made(last) if lost else last
            found = self._read_back(key, lost)
            if found is not None and found.data == data:
                return found.version
            if self._changed(found, expected):
                if lost:
                    raise self._uncertain(key)
                return None
        assert last is not None
        raise _perhaps_made(last) if lost else last

    def _read_back(self, key: str, lost: bool) -> FoundObject | None:
        try:
            return self.read(key)
        except RemoteError as error:
            raise _perhaps_made(error) if lost else error from None

    @staticmethod
    def _changed(found: FoundObject | None, expected: Version | None) -> bool:
        """Whether the condition no longer holds. Where it still does, the write was not made, and is tried again."""
        if expected is None or found is None:
            return (found is None) != (expected is None)
        return not _same(found.version, expected)

    def _uncertain(self, key: str) -> RemoteUncertain:
        return RemoteUncertain(
            f"the answer to a write of {key} at {self._url} was lost, and it has changed since: it may have been made "
            "before, or never. Read it, and look for the write in its history."
        )


def _perhaps_made(error: RemoteError) -> RemoteError:
    return type(error)(f"{error} The write may have been made.")


def _mode(expected: Version | None) -> Any:
    """Keys without a value are left out: obstore takes no None (findings/obstore-version-of-a-put.sh)."""
    if expected is None:
        return "create"
    return {name: value for name, value in expected._asdict().items() if value is not None}


def _version(meta: Any) -> Version:
    return Version(meta.get("e_tag"), meta.get("version"))


def _same(one: Version, other: Version) -> bool:
    if one.e_tag is not None and other.e_tag is not None:
        return one.e_tag == other.e_tag
    return one.version == other.version


def _runs(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges that hold a byte as [start, end) in order, those that overlap or lie closer than `GAP` as one."""
    runs: list[tuple[int, int]] = []
    for start, length in sorted(ranges):
        if not length:
            continue
        if runs and start - runs[-1][1] <= GAP:
            runs[-1] = (runs[-1][0], max(runs[-1][1], start + length))
        else:
            runs.append((start, start + length))
    return runs


def _cut(runs: list[tuple[int, int]], parts: list[memoryview], start: int, length: int) -> memoryview:
    if not length:
        return memoryview(b"")
    at = bisect_right(runs, start, key=lambda run: run[0]) - 1
    offset = start - runs[at][0]
    return parts[at][offset : offset + length]
