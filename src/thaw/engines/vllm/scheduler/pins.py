"""Pins: blocks held in the engine for a while, because somebody asked. Few, limited in time, and ended first."""

from __future__ import annotations

import time
from dataclasses import dataclass

from thaw.core.errors import InvalidRequest
from thaw.engines.vllm.scheduler.content_ids import BlockContents
from thaw.engines.vllm.scheduler.records import SchedulerRecord
from thaw.engines.vllm.settings import VllmSettings


@dataclass
class PinnedBlocks:
    until: float
    blocks: list[int]


class BlockPins:
    """By the record's name. A held block has one reference more in vLLM's pool, and nothing else."""

    def __init__(self, contents: BlockContents, settings: VllmSettings, num_blocks: int) -> None:
        self._contents, self._settings, self._num_blocks = contents, settings, num_blocks
        self._held: dict[str, PinnedBlocks] = {}

    def pin(self, name: str, record: SchedulerRecord, seconds: float) -> tuple[int, float]:
        """(blocks held, for how long). Raises `InvalidRequest` where that is more than may be held."""
        limit = min(seconds, self._settings.pin_seconds)
        blocks = self._contents.resident(record)
        room = int(self._settings.pin_fraction * self._num_blocks) - self.num_blocks()
        if len(blocks) > room:
            raise InvalidRequest(
                f"pinning {len(blocks)} blocks: only {max(room, 0)} of {self._num_blocks} may still be pinned "
                f"(pin_fraction {self._settings.pin_fraction}); park instead, or unpin others"
            )
        pool = self._contents.pool
        pool.touch([pool.blocks[b] for b in blocks])
        self._held[name] = PinnedBlocks(time.monotonic() + limit, blocks)
        return len(blocks), limit

    def unpin(self, name: str) -> None:
        pinned = self._held.pop(name, None)
        if pinned is not None:
            pool = self._contents.pool
            pool.free_blocks([pool.blocks[b] for b in reversed(pinned.blocks)])

    def release(self) -> None:
        """End those that have had their time."""
        now = time.monotonic()
        for name in [name for name, pinned in self._held.items() if pinned.until <= now]:
            self.unpin(name)

    def reset(self) -> None:
        for name in list(self._held):
            self.unpin(name)

    def num_blocks(self) -> int:
        return sum(len(pinned.blocks) for pinned in self._held.values())
