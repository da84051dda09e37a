"""How far a transfer is, for who watches it from another thread."""

from __future__ import annotations

import threading
import time


class TransferMeter:
    """Counts bytes that were sent or received. One for each transfer; read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self.step = "connecting"
        """What is being done."""
        self.nbytes = 0
        """Bytes of packs that were moved."""
        self.total_nbytes = 0
        """Bytes of packs that are to be moved, as far as is known."""
        self.num_skipped_packs = 0
        """Packs that an earlier push had sent."""

    def begin(self, step: str, total_nbytes: int = 0) -> None:
        with self._lock:
            self.step, self.total_nbytes = step, self.total_nbytes + total_nbytes

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.nbytes += nbytes

    def skip(self) -> None:
        with self._lock:
            self.num_skipped_packs += 1

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def bytes_per_s(self) -> float:
        return self.nbytes / max(self.seconds, 1e-9)
