"""Parking: a session's KV out of the engine's memory, into an unlinked file of shared memory, and back.

The file is private (0600, no name) and ends with the process. Every page is hashed on the way out and checked on the
way back, so a parked session comes back byte for byte or fails by name.
"""

from __future__ import annotations

import os
import tempfile

from blake3 import blake3

from thaw.core.errors import CorruptBlob
from thaw.core.prefix import windows
from thaw.engines.embedded.pages import ExtentFactory, PagedKV


class Parked:
    """The parked pages of one session. The session's own pages are let go on construction."""

    def __init__(self, kv: PagedKV) -> None:
        self._num_tokens = kv.num_tokens
        self._heads = kv.factory.group.num_kv_heads
        self._token_nbytes = kv.factory.group.token_nbytes_per_head
        self._digests: list[bytes] = []
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self._file = tempfile.TemporaryFile(dir=folder, prefix="thaw-park-", buffering=0)  # noqa: SIM115 - lives until restore
        for head, start, stop in self._pieces():
            data = kv.read(head, start, stop)
            self._digests.append(blake3(data).digest())
            self._file.write(data)
        kv.runs, kv.num_tokens = [], 0

    def _pieces(self) -> list[tuple[int, int, int]]:
        return [(head, a, b) for a, b in windows(0, self._num_tokens) for head in range(self._heads)]

    def restore(self, factory: ExtentFactory) -> PagedKV:
        """The pages again. Raises `CorruptBlob` when they are not what was parked."""
        kv = PagedKV(factory)
        kv.reserve(self._num_tokens)
        self._file.seek(0)
        for (head, start, stop), digest in zip(self._pieces(), self._digests, strict=True):
            data = self._file.read((stop - start) * self._token_nbytes)
            if blake3(data).digest() != digest:
                raise CorruptBlob(f"parked KV of tokens {start}..{stop} changed in memory; hydrate the last commit")
            kv.write(head, start, stop, memoryview(data), stop - start)
        kv.num_tokens = self._num_tokens
        self._file.close()
        return kv
