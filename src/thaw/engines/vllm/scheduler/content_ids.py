"""What lies in which of the engine's blocks, by number: equal tokens may have unequal bits, equal numbers never have.

vLLM finds blocks by the hash of their tokens. A number is given to what a request computed into a block, and to what
thaw loaded there; it ends when vLLM gives the block to somebody else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from thaw.engines.vllm.scheduler.records import SchedulerRecord


@dataclass
class Found:
    """What vLLM's cache had for full blocks, the first ones of a chain: by `hashes`, a block of each group. `keys` is
    what the blocks themselves say that they hold."""

    hashes: list[bytes] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    keys: list[Any] = field(default_factory=list)


class BlockContents:
    """`groups`: those of vLLM's KV cache groups that keep tokens, or how many there are, where all do. Their blocks
    that hold the same tokens have one number. Not `shared`: no session takes a block from vLLM's cache, and no record
    has a chain."""

    def __init__(self, groups: int | Sequence[int] = 1, *, shared: bool = True) -> None:
        self._groups = list(range(groups) if isinstance(groups, int) else groups)
        self.num_groups, self.shared = len(self._groups), shared
        self._in_block: dict[int, int] = {}
        self._numbers = itertools.count(1)
        self._given: set[int] = set()
        self._found = Found()
        self.pool: Any = None
        """vLLM's block pool, once it is bound."""

    def fresh(self) -> int:
        return next(self._numbers)

    def chain(self, num_full: int) -> list[int]:
        """That of a record whose full blocks are nobody else's yet."""
        return [self.fresh() for _ in range(num_full)] if self.shared else []

    def renew(self, blocks: Iterable[int]) -> None:
        """These blocks get other content now."""
        for block in blocks:
            self._in_block.pop(block, None)
            self._given.add(block)

    def forget_uncached(self) -> None:
        """Where vLLM's cache is empty, no block holds anything that a session could find."""
        if self.pool is not None and all(block.block_hash is None for block in self.pool.blocks):
            self._in_block.clear()
            self._found = Found()

    def step_begins(self) -> None:
        """What was given away so far was given away in the step before."""
        self._given.clear()

    def note_computed(self, record: SchedulerRecord, tables: Sequence[Sequence[int]], num_full: int) -> None:
        """The record's full blocks up to `num_full` are what lies in the blocks of `tables`. One that was given away in
        this very step is known by its number alone."""
        if not self.shared:
            return
        for i in range(len(record.chain), num_full):
            number, same = self.fresh(), [table[i] for table in tables]
            if not any(block in self._given for block in same):
                first, *others = [self._in_block.get(block) for block in same]
                number = first if first is not None and others == [first] * len(others) else number
                self._in_block.update(dict.fromkeys(same, number))
            record.chain.append(number)

    def note_loaded(self, record: SchedulerRecord, tables: Sequence[Sequence[int]], first: int, end: int) -> None:
        """The record's full blocks [first, end) are loaded into those of `tables`."""
        for i in range(first, min(end, len(record.chain))):
            for table in tables:
                self._in_block[table[i]] = record.chain[i]

    def hits_foreign(self, request: Any, chain: Sequence[int]) -> bool:
        """Whether vLLM would take a block from its cache for one of the chain's and it is not that one."""
        if self.pool is None:
            return False
        found = self._found_again(request.block_hashes, chain)
        at = len(found.hashes)
        for block_hash, number in zip(request.block_hashes[at:], chain[at:], strict=False):
            hit = self.pool.get_cached_block(block_hash, self._groups)
            if not hit:
                break
            for block in hit:
                if self._in_block.get(block.block_id) != number:
                    return True
                found.blocks.append(block.block_id)
                found.keys.append(block.block_hash)
            found.hashes.append(block_hash)
        self._found = found
        return False

    def _found_again(self, hashes: Sequence[bytes], chain: Sequence[int]) -> Found:
        """What the last walk found, as far as this one would find the same: siblings have their prefix in common, and
        one lookup a block takes as long as all of these comparisons. vLLM takes the block that has had a hash longest,
        so one that still has its hash and its content is still the one."""
        last, each = self._found, self.num_groups
        n = min(len(last.hashes), len(hashes), len(chain))
        before = Found(last.hashes[:n], last.blocks[: n * each], last.keys[: n * each])
        blocks = self.pool.blocks
        numbers = list(chain[:n]) if each == 1 else [number for number in chain[:n] for _ in range(each)]
        same = (
            before.hashes == list(hashes[:n])
            and [self._in_block.get(block) for block in before.blocks] == numbers
            and [blocks[block].block_hash for block in before.blocks] == before.keys
        )
        return before if same else Found()

    def has(self, block_hash: Any) -> bool:
        """Whether vLLM would find a block of that hash: in every group, else it takes none."""
        return self.pool is not None and bool(self.pool.get_cached_block(block_hash, self._groups))

    def resident(self, record: SchedulerRecord) -> list[int]:
        """The blocks that hold the record's full ones, from the first on, as far as they still lie in the engine's
        cache, in every group."""
        where: dict[int, list[int]] = {}
        for block, number in self._in_block.items():
            where.setdefault(number, []).append(block)
        found = [where.get(number, []) for number in record.chain]
        kept = itertools.takewhile(lambda same: len(same) >= self.num_groups, found)
        return [same for blocks in kept for same in blocks[-self.num_groups :] if self._is_cached(same)]

    def _is_cached(self, block: int) -> bool:
        return self.pool.blocks[block].block_hash is not None
