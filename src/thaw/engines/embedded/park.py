"""Parking: a session's KV out of the engine's memory, into an unlinked file of shared memory, and back.

The file is private (0600, no name) and ends with the process. Every page and state is hashed on the way out and checked
on the way back, so a parked session comes back byte for byte or fails by name.
"""

from __future__ import annotations

import os
import tempfile

from blake3 import blake3

from thaw.core.cache import columns
from thaw.core.errors import CorruptBlob
from thaw.core.prefix import windows
from thaw.engines.embedded.pages import ExtentFactory, PagedKV


class Parked:
    """The parked pages of one session. The session's own pages are let go on construction."""

    def __init__(self, kv: PagedKV) -> None:
        self.num_tokens = kv.num_tokens
        self._columns = columns(kv.factory.groups)
        self._asked, self._there = set(kv.asked), kv.there
        self._states = {token: [len(blob) for blob in state] for token, state in kv.points.items()}
        self._digests: list[bytes] = []
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self._file = tempfile.TemporaryFile(dir=folder, prefix="thaw-park-", buffering=0)  # noqa: SIM115 - lives until restore
        for column, start, stop in self._pieces():
            self._put(kv.read(column, start, stop))
        for state in kv.points.values():
            for blob in state:
                self._put(bytes(blob))
        kv.runs, kv.num_tokens, kv.points = [], 0, {}

    def _pieces(self) -> list[tuple[int, int, int]]:
        return [(column, a, b) for a, b in windows(0, self.num_tokens) for column in range(len(self._columns))]

    def _put(self, data: bytes | memoryview) -> None:
        self._digests.append(blake3(data).digest())
        self._file.write(data)

    def restore(self, factory: ExtentFactory) -> PagedKV:
        """The pages again. Raises `CorruptBlob` when they are not what was parked."""
        kv = PagedKV(factory)
        kv.reserve(self.num_tokens)
        self._file.seek(0)
        digests = iter(self._digests)
        for column, start, stop in self._pieces():
            nbytes = (stop - start) * self._columns[column].group.token_nbytes_per_blob
            data = self._take(nbytes, next(digests), f"KV of tokens {start}..{stop}")
            kv.write(column, start, stop, memoryview(data), stop - start)
        for token, sizes in self._states.items():
            what = f"state after {token} tokens"
            kv.points[token] = tuple(self._take(nbytes, next(digests), what) for nbytes in sizes)
        kv.num_tokens, kv.asked, kv.there = self.num_tokens, self._asked, self._there
        self._file.close()
        return kv

    def _take(self, nbytes: int, digest: bytes, what: str) -> bytes:
        data = self._file.read(nbytes)
        if blake3(data).digest() != digest:
            raise CorruptBlob(f"parked {what} changed in memory; hydrate the last commit")
        return data
