"""What lies in which of the engine's blocks, by number: equal tokens may have unequal bits, equal numbers never have.

vLLM finds blocks by the hash of their tokens. A number is given to what a request computed into a block, and to what
thaw loaded there; it ends when vLLM gives the block to somebody else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from thaw.engines.vllm.records import Record


class Found(NamedTuple):
    """What vLLM's cache had for a full block: `key` is what the block itself says that it holds."""

    hash: bytes
    block: int
    key: Any


class Contents:
    def __init__(self) -> None:
        self._in_block: dict[int, int] = {}
        self._numbers = itertools.count(1)
        self._given: set[int] = set()
        self._found: list[Found] = []
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
        if self.pool is None:
            return False
        found = self._found_again(request.block_hashes, chain)
        for block_hash, number in zip(request.block_hashes[len(found) :], chain[len(found) :], strict=False):
            hit = self.pool.get_cached_block(block_hash, [0])
            if not hit:
                break
            if self._in_block.get(hit[0].block_id) != number:
                return True
            found.append(Found(block_hash, hit[0].block_id, hit[0].block_hash))
        self._found = found
        return False

    def _found_again(self, hashes: Sequence[bytes], chain: Sequence[int]) -> list[Found]:
        """What the last walk found, as far as this one would find the same: siblings have their prefix in common, and
        one lookup a block takes as long as all of these comparisons. vLLM takes the block that has had a hash longest,
        so one that still has its hash and its content is still the one."""
        n = min(len(self._found), len(hashes), len(chain))
        before = self._found[:n]
        blocks = self.pool.blocks
        same = (
            [x.hash for x in before] == list(hashes[:n])
            and [self._in_block.get(x.block) for x in before] == list(chain[:n])
            and [blocks[x.block].block_hash for x in before] == [x.key for x in before]
        )
        return before if same else []

    def has(self, block_hash: Any) -> bool:
        """Whether vLLM would find a block of that hash."""
        return self.pool is not None and bool(self.pool.get_cached_block(block_hash, [0]))

    def resident(self, record: Record) -> list[int]:
        """The record's full blocks, from the first on, as far as they still lie in the engine's cache."""
        where = {number: block for block, number in self._in_block.items()}
        found = [where.get(number) for number in record.chain]
        kept = list(itertools.takewhile(lambda block: block is not None, found))
        return [b for b in kept if b is not None and self.pool.blocks[b].block_hash is not None]
