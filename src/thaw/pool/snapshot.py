"""A snapshot: a session in the pool's arena, held until it is released. A point that outlives its worker."""

from __future__ import annotations

from thaw.core.errors import InvalidRequest
from thaw.pool.shm.shared_store import SharedPoint


class Snapshot:
    """Made by `ForkPool.snapshot`. Its bytes are kept until `release`, or until nobody holds it. It is of the first
    `num_tokens` tokens of `point`, which may have more: it was captured for another one."""

    def __init__(self, point: SharedPoint, num_tokens: int) -> None:
        self._point: SharedPoint | None = point
        self.num_tokens = num_tokens

    @property
    def point(self) -> SharedPoint:
        """Raises `InvalidRequest` after `release`."""
        if self._point is None:
            raise InvalidRequest("this snapshot was released; take another one")
        return self._point

    @property
    def nbytes_written(self) -> int:
        """What it took: the part that the arena did not have."""
        return self.point.nbytes

    @property
    def seconds(self) -> float:
        return self.point.seconds

    def release(self) -> None:
        """Let go of it. Rounds under way keep what they need. Idempotent."""
        self._point = None

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
