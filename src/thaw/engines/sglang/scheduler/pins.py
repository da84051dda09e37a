"""Pins: what of a record lies in SGLang's tree, locked there for a while, on request. Few, limited in time,
and ended first: pinned tokens starve requests that need the room."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from thaw.core.errors import InvalidRequest
from thaw.engines.served.protocol import EngineFacts
from thaw.engines.sglang.scheduler.records import RankRecord
from thaw.engines.sglang.settings import SglangSettings


@dataclass
class PinnedTokens:
    until: float
    lock: Any
    num_tokens: int


class RadixPins:
    """By the record's name. `lock` and `unlock` are the tree's, once the cache has bound them."""

    def __init__(self, settings: SglangSettings, engine: EngineFacts) -> None:
        self._settings, self._engine = settings, engine
        self._held: dict[str, PinnedTokens] = {}
        self.lock: Callable[[RankRecord], tuple[Any, int]] = unbound
        """(the lock, how many of the record's tokens it holds)"""
        self.unlock: Callable[[Any], None] = unbound

    def pin(self, name: str, record: RankRecord, seconds: float) -> tuple[int, float]:
        """(tokens held, for how long). Raises `InvalidRequest` where that is more than may be held."""
        limit = min(seconds, self._settings.pin_seconds)
        lock, num_tokens = self.lock(record)
        engine = self._engine
        room = int(self._settings.pin_fraction * engine.num_blocks * engine.block_size) - self.num_tokens()
        if num_tokens > room:
            self.unlock(lock)
            raise InvalidRequest(
                f"pinning {num_tokens} tokens: only {max(room, 0)} of {engine.num_blocks} blocks' may still be "
                f"pinned (pin_fraction {self._settings.pin_fraction}); park instead, or unpin others"
            )
        self._held[name] = PinnedTokens(time.monotonic() + limit, lock, num_tokens)
        return num_tokens, limit

    def unpin(self, name: str) -> None:
        pinned = self._held.pop(name, None)
        if pinned is not None:
            self.unlock(pinned.lock)

    def overdue(self) -> tuple[str, ...]:
        """Those that have had their time, by this rank's clock."""
        now = time.monotonic()
        return tuple(name for name, pinned in self._held.items() if pinned.until <= now)

    def reset(self) -> None:
        for name in list(self._held):
            self.unpin(name)

    def lost(self) -> None:
        """The tree is gone, and the locks with it."""
        self._held.clear()

    def num_tokens(self) -> int:
        return sum(pinned.num_tokens for pinned in self._held.values())


def unbound(*_: Any) -> Any:
    raise AssertionError("the cache binds this when it is made")
