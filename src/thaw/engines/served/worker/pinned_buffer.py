"""Host memory taken and pinned once, at boot: nothing is touched or registered for the first time under a request."""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
import threading
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

from thaw.core.errors import StorageFailed

GRAIN = 4096
TOUCHED_AT_ONCE = 64 << 20
MADV_HUGEPAGE = 14


class PinnedBuffer:
    """`nbytes` of pinned memory, given out in runs: the first that is large enough.

    `shared`: it is a file in memory that other processes may map by `fd`; it is gone once nobody has it any more.
    Unless it is pinned as well, the system then gives each page when it is first used. Raises `StorageFailed` when the
    system does not give or pin that much.
    """

    def __init__(self, nbytes: int, *, pin: bool = True, shared: bool = False) -> None:
        self._nbytes = max(GRAIN, nbytes // GRAIN * GRAIN)
        self._lock = threading.Lock()
        self._free: list[tuple[int, int]] = [(0, self._nbytes)]
        self._returned: deque[tuple[int, int]] = deque()
        self.fd = self._file() if shared else -1
        """Of a shared one. A handed down copy of it is that process's own to close."""
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            self._map = mmap.mmap(self.fd, self._nbytes, flags=flags)
        except OSError as error:
            raise StorageFailed(self._too_large(str(error))) from None
        self.memory = torch.frombuffer(self._map, dtype=torch.uint8)
        if pin or not shared:
            self._touch()
        if pin:
            code = int(torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), self._nbytes, 3))  # type: ignore[no-untyped-call]
            if code:
                raise StorageFailed(self._too_large(f"CUDA error {code}"))

    def _file(self) -> int:
        fd = os.memfd_create("thaw-arena", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, fd)
        os.ftruncate(fd, self._nbytes)
        return fd

    def offset(self, tensor: torch.Tensor) -> int | None:
        """Where the tensor begins in it; None for one that lies elsewhere."""
        at = tensor.data_ptr() - self.memory.data_ptr()
        return at if 0 <= at < self._nbytes else None

    def _too_large(self, why: str) -> str:
        return f"{self._nbytes >> 20} MiB of host memory for the arena: {why}; start with a smaller arena_nbytes"

    def _touch(self) -> None:
        """Every page once, by several threads: the system zeroes them one by one else, at the first use."""
        libc, start = ctypes.CDLL(None), self.memory.data_ptr()
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(self._nbytes), MADV_HUGEPAGE)

        def zero(at: int) -> None:
            ctypes.memset(start + at, 0, min(TOUCHED_AT_ONCE, self._nbytes - at))

        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
            list(threads.map(zero, range(0, self._nbytes, TOUCHED_AT_ONCE)))

    def take(self, nbytes: int) -> tuple[int, torch.Tensor] | None:
        """(offset, memory of at least `nbytes`), or None when no run is large enough."""
        wanted = _grains(nbytes)
        with self._lock:
            self._merge()
            for i, (start, stop) in enumerate(self._free):
                if stop - start >= wanted:
                    self._free[i : i + 1] = [(start + wanted, stop)] if stop - start > wanted else []
                    return start, self.memory[start : start + wanted]
        return None

    def give_back(self, start: int, nbytes: int) -> None:
        """The run at `start` is free again. Takes no lock: Python's collector may call it at any point."""
        self._returned.append((start, start + _grains(nbytes)))

    def _merge(self) -> None:
        """What came back is free, and one with its free neighbours."""
        while self._returned:
            start, stop = self._returned.popleft()
            i = bisect.bisect(self._free, (start, stop))
            if i < len(self._free) and self._free[i][0] == stop:
                stop = self._free.pop(i)[1]
            if i and self._free[i - 1][1] == start:
                i -= 1
                start = self._free.pop(i)[0]
            self._free.insert(i, (start, stop))

    @property
    def largest(self) -> int:
        """Bytes of the largest free run."""
        with self._lock:
            self._merge()
            return max((stop - start for start, stop in self._free), default=0)


def _grains(nbytes: int) -> int:
    return max(GRAIN, -(-nbytes // GRAIN) * GRAIN)
