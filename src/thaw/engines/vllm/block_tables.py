"""Which of vLLM's KV cache groups keep tokens and which keep states, and the block that a state lies in.

vLLM deals layers that keep a state out to several groups, whose blocks are taken from one pool. Each has a block size:
in mode "align" that of the other groups, in mode "none" the longest length that there is, so a request has one block.
No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from thaw.core.errors import LawBroken
from thaw.engines.vllm.jobs import Tables

AnyTables: TypeAlias = Sequence[Sequence[int]]
STATES = "MambaSpec"
"""What vLLM calls the layout of a state, whatever makes it."""


@dataclass(frozen=True)
class StateTable:
    """One of vLLM's groups whose layers keep a state."""

    group: int
    block_size: int

    def block(self, tables: AnyTables, num_tokens: int) -> int:
        """The block that holds the state after exactly `num_tokens` tokens, once a step has ended there. Not the last
        one of the table: an earlier state's block may stand behind it for a step."""
        column = (num_tokens - 1) // self.block_size
        table = tables[self.group]
        block = table[column] if column < len(table) else 0
        if block == 0:
            raise LawBroken(f"vLLM has no block for the state after {num_tokens} tokens: group {self.group}, {table}")
        return block


@dataclass(frozen=True)
class BlockTables:
    """`tokens`: the numbers of the groups that keep tokens."""

    tokens: tuple[int, ...]
    states: tuple[StateTable, ...] = ()

    def of_tokens(self, tables: AnyTables) -> Tables:
        """The tables of the groups that keep tokens."""
        return tuple(tuple(tables[group]) for group in self.tokens)

    def state_blocks(self, tables: AnyTables, num_tokens: int) -> tuple[int, ...]:
        """The block of each group's state after `num_tokens` tokens."""
        return tuple(table.block(tables, num_tokens) for table in self.states)


def of_groups(groups: Sequence[Any]) -> BlockTables:
    """By the specs of vLLM's KV cache groups."""
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    states = tuple(
        StateTable(i, group.kv_cache_spec.block_size)
        for i, (kind, group) in enumerate(zip(kinds, groups, strict=True))
        if kind == STATES
    )
    return BlockTables(tuple(i for i, kind in enumerate(kinds) if kind != STATES), states)
