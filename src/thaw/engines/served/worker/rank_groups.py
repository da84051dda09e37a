"""The part of a model's cache that one tensor-parallel rank holds, cache group by cache group.

KV of tokens lies in host memory as *strips*: a group has one, or two where its K and V differ in width.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from thaw.core.cache import DTYPE_BYTES, CacheGroup, Dtype, TokenGroup, held, keeps_all, point_groups, token_groups
from thaw.core.errors import Unsupported


class Strip(NamedTuple):
    """[blob][layer][plane][token][width]: planes that are alike (K and V, or one of them, or a latent's) of a group's
    blobs that this rank holds."""

    group: TokenGroup
    num_blobs: int
    num_planes: int
    width: int

    def shape(self, num_tokens: int) -> tuple[int, int, int, int, int]:
        return (self.num_blobs, self.group.num_layers, self.num_planes, num_tokens, self.width)

    @property
    def token_nbytes(self) -> int:
        return prod(self.shape(1)) * DTYPE_BYTES[self.group.dtype]


class RankGroups:
    """`strips` in the order of the token groups; `states`: (shape, dtype) of each point state's blob that this rank
    holds, in order; `state_nbytes`: what all of them take."""

    def __init__(self, groups: Sequence[CacheGroup], rank: int = 0, num_ranks: int = 1) -> None:
        self.groups, self._rank, self._num_ranks = tuple(groups), rank, num_ranks
        self.strips = tuple(
            Strip(group, len(self.held(group)), count, width)
            for group in token_groups(groups)
            for count, width in group.layer_planes
        )
        self.states: tuple[tuple[tuple[int, ...], Dtype], ...] = tuple(
            ((group.num_layers, *group.blobs[index][0].shape), group.blobs[index][0].dtype)
            for group in point_groups(groups)
            for index in self.held(group)
        )
        self.state_nbytes = sum(prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in self.states)
        self.token_nbytes = max(1, sum(strip.token_nbytes for strip in self.strips))

    def held(self, group: CacheGroup) -> tuple[int, ...]:
        """The blobs of the group that this rank holds."""
        return held(group, self._rank, self._num_ranks)

    def written(self, group: CacheGroup) -> tuple[int, ...]:
        """Those of them that it writes: what several ranks hold is written by the first of them."""
        before = {index for rank in range(self._rank) for index in held(group, rank, self._num_ranks)}
        return tuple(index for index in self.held(group) if index not in before)

    def require(self, heads: Sequence[int]) -> None:
        """Raise `Unsupported` unless the engine's rank has so many heads of each strip, which it itself says that it
        has: else blobs would be of other heads than they are named for."""
        for strip, there in zip(self.strips, heads, strict=True):
            if strip.num_blobs != there:
                raise Unsupported(
                    f"rank {self._rank} of {self._num_ranks} has {there} KV heads of cache group {strip.group.name}, "
                    f"which are {strip.group.num_blobs} in all; it should have {strip.num_blobs}"
                )

    def windows(self) -> tuple[tuple[int, TokenGroup], ...]:
        """The strips of groups that keep their last tokens alone, each with its number."""
        return tuple((at, strip.group) for at, strip in enumerate(self.strips) if not keeps_all([strip.group]))

    def strips_of(self, group: TokenGroup) -> list[int]:
        """The numbers of the group's strips."""
        return [i for i, strip in enumerate(self.strips) if strip.group is group]
