"""What lies in which of the engine's blocks, by number: equal tokens may have unequal bits, equal numbers never have.

vLLM finds blocks by the hash of their tokens. A number is given to what a request computed into a block, and to what
thaw loaded there; it ends when vLLM gives the block to somebody else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from thaw.engines.vllm.records import Record


class Contents:
    def __init__(self) -> None:
        self._in_block: dict[int, int] = {}
        self._numbers = itertools.count(1)
        self._given: set[int] = set()
        self.pool: Any = None
        """vLLM's block pool, once it is bound."""

    def fresh(self) -> int:
        return next(self._numbers)

    def renew(self, blocks: Iterable[int]) -> None:
        """These blocks get other content now."""
        for block in blocks:
            self._in_block.pop(block, None)
            self._given.add(block)

    def step_begins(self) -> None:
        """What was given away so far was given away in the step before."""
        self._given.clear()

    def note_computed(self, record: Record, blocks: Sequence[int], num_full: int) -> None:
        """The record's full blocks up to `num_full` are what lies in `blocks`. One that was given away in this very
        step is known by its number alone."""
        for i in range(len(record.chain), num_full):
            number = self.fresh()
            lost = blocks[i] in self._given
            record.chain.append(number if lost else self._in_block.setdefault(blocks[i], number))

    def note_loaded(self, record: Record, blocks: Sequence[int], first: int, end: int) -> None:
        """The record's full blocks [first, end) are loaded into `blocks`."""
        for i in range(first, min(end, len(record.chain))):
            self._in_block[blocks[i]] = record.chain[i]

    def hits_foreign(self, request: Any, chain: Sequence[int]) -> bool:
        """Whether vLLM would take a block from its cache for one of the chain's and it is not that one."""
        for block_hash, number in zip(request.block_hashes, chain, strict=False):
            found = self.pool.get_cached_block(block_hash, [0]) if self.pool is not None else None
            if not found:
                return False
            if self._in_block.get(found[0].block_id) != number:
                return True
        return False

    def resident(self, record: Record) -> list[int]:
        """The record's full blocks, from the first on, as far as they still lie in the engine's cache."""
        where = {number: block for block, number in self._in_block.items()}
        found = [where.get(number) for number in record.chain]
        kept = list(itertools.takewhile(lambda block: block is not None, found))
        return [b for b in kept if b is not None and self.pool.blocks[b].block_hash is not None]
