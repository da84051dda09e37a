"""Cache groups: layers whose cache has one shape, of four kinds. A new kind is added here; what else it
needs is listed under "A new kind of cache" in docs/architecture.md.

Store, repository and pool ask a group what it needs, never which kind it is. Only engines do, where they make and lay
out caches.

    FullKV      keys and values of every token
    SlidingKV   keys and values of the last tokens: a token attends to `window`, itself among them
    LatentKV    one vector a token, without heads and without K and V (MLA; an indexer's keys); may have a window too
    PointState  a state after exactly n tokens, made of named parts; it exists only at tokens where it was kept

The first three are *token groups*: their bytes belong to tokens and lie in segments, `num_blobs` blobs each. A blob of
n tokens is its *planes* one after the other, each [token][plane nbytes], C order, little-endian: for each layer K, then
V (`full`, `sliding`: a blob a KV head, keys after rope), or the vector (`latent`: one blob). A point state is one blob
for each head of each part: [layer][*shape].

Groups of a model that has plain full groups alone are written as format 1 has them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate, chain, pairwise
from math import prod
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}
SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "uint8": "U8"}
"""What packs call the dtypes."""
Dtype = Literal["float32", "bfloat16", "float16", "uint8"]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9_.-]{1,40}\Z")]
Layer = Annotated[int, msgspec.Meta(ge=0)]
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class _Layers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """Layers [first_layer, first_layer + num_layers), or `layers` where they are not neighbours: in order, beginning
    with `first_layer`. A layer may be in several groups."""

    name: Name
    first_layer: int
    num_layers: int
    layers: tuple[Layer, ...] | UnsetType = UNSET

    def __post_init__(self) -> None:
        if self.layers is UNSET:
            return
        named = tuple(self.layers)
        if len(named) != self.num_layers or named[:1] != (self.first_layer,) or list(named) != sorted(set(named)):
            raise ValueError(
                f"group {self.name}: layers {list(named)} are not {self.num_layers} from {self.first_layer}"
            )
        if named == tuple(range(self.first_layer, self.first_layer + self.num_layers)):
            raise ValueError(f"group {self.name}: its layers are neighbours; `layers` is left out then")

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        if self.layers is not UNSET:
            return self.layers
        return tuple(range(self.first_layer, self.first_layer + self.num_layers))

    @property
    def layers_text(self) -> str:
        if self.layers is not UNSET:
            return "layers " + ",".join(map(str, self.layers))
        return f"layers {self.first_layer}..{self.first_layer + self.num_layers - 1}"


class _KV(_Layers, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """A blob holds one KV head: for each layer K [token][head_dim], then V [token][value_dim], else of `head_dim`."""

    num_kv_heads: int
    head_dim: int
    dtype: Dtype
    value_dim: Size | UnsetType = UNSET

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_dim == self.head_dim:
            raise ValueError(f"group {self.name}: K and V are alike; `value_dim` is left out then")

    @property
    def num_blobs(self) -> int:
        return self.num_kv_heads

    @property
    def planes(self) -> tuple[int, ...]:
        """Bytes of a token in each plane of a blob."""
        size = DTYPE_BYTES[self.dtype]
        value = self.head_dim if self.value_dim is UNSET else self.value_dim
        return (self.head_dim * size, value * size) * self.num_layers

    @property
    def layer_planes(self) -> tuple[tuple[int, int], ...]:
        """A layer's planes, those alike together: (how many, numbers of a token in each)."""
        if self.value_dim is UNSET:
            return ((2, self.head_dim),)
        return ((1, self.head_dim), (1, self.value_dim))

    def blob_shape(self, num_tokens: int) -> tuple[int, ...]:
        """Of a blob as a tensor: [layer][K|V][token][head_dim], or flat where K and V differ."""
        if self.value_dim is not UNSET:
            return (num_tokens * self.token_nbytes_per_blob // DTYPE_BYTES[self.dtype],)
        return (self.num_layers, 2, num_tokens, self.head_dim)

    @property
    def token_nbytes_per_blob(self) -> int:
        value = self.head_dim if self.value_dim is UNSET else self.value_dim
        return self.num_layers * (self.head_dim + value) * DTYPE_BYTES[self.dtype]

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token in this group, all heads."""
        return self.num_blobs * self.token_nbytes_per_blob

    def share(self, rank: int, num_ranks: int) -> range:
        """The blobs that a tensor-parallel rank holds: its heads, or one head that others hold too."""
        return _heads(self.num_kv_heads, rank, num_ranks)

    @property
    def shape_text(self) -> str:
        wide = "" if self.value_dim is UNSET else f" (V {self.value_dim})"
        return f"{self.num_kv_heads} KV heads of {self.head_dim}{wide}"


class FullKV(_KV, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="full"):
    """Keys and values of every token."""

    def covers(self, num_kv: int) -> range:
        """The tokens whose bytes are needed to go on after `num_kv` tokens."""
        return range(num_kv)

    @property
    def plain(self) -> bool:
        """Whether format 1 can say it."""
        return self.layers is UNSET and self.value_dim is UNSET

    def __str__(self) -> str:
        return f"{self.name}: {self.layers_text}, {self.shape_text}, {self.dtype}"


class SlidingKV(_KV, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="sliding"):
    """Keys and values of the last tokens. A token attends to `window` tokens, itself among them."""

    window: Annotated[int, msgspec.Meta(ge=2)]
    plain = False

    def covers(self, num_kv: int) -> range:
        """The tokens whose bytes are needed to go on after `num_kv` tokens."""
        return _window(num_kv, self.window)

    def __str__(self) -> str:
        return f"{self.name}: {self.layers_text}, {self.shape_text}, {self.dtype}, window {self.window}"


class LatentKV(_Layers, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="latent"):
    """One vector of `width` a token and layer, the same on every rank."""

    width: Size
    dtype: Dtype
    window: Annotated[int, msgspec.Meta(ge=2)] | UnsetType = UNSET
    plain = False
    num_blobs = 1

    @property
    def planes(self) -> tuple[int, ...]:
        return (self.width * DTYPE_BYTES[self.dtype],) * self.num_layers

    @property
    def layer_planes(self) -> tuple[tuple[int, int], ...]:
        return ((1, self.width),)

    def blob_shape(self, num_tokens: int) -> tuple[int, ...]:
        return (self.num_layers, num_tokens, self.width)

    @property
    def token_nbytes_per_blob(self) -> int:
        return self.num_layers * self.width * DTYPE_BYTES[self.dtype]

    @property
    def token_nbytes(self) -> int:
        return self.token_nbytes_per_blob

    def covers(self, num_kv: int) -> range:
        return range(num_kv) if self.window is UNSET else _window(num_kv, self.window)

    def share(self, rank: int, num_ranks: int) -> range:
        """Every rank holds all of it."""
        return range(1)

    def __str__(self) -> str:
        window = "" if self.window is UNSET else f", window {self.window}"
        return f"{self.name}: {self.layers_text}, latent of {self.width}, {self.dtype}{window}"


class StatePart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tensor of a point state: for each of `num_heads` a blob [layer][*shape] in `dtype`."""

    name: Name
    num_heads: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    shape: Annotated[tuple[Size, ...], msgspec.Meta(min_length=1, max_length=8)]
    dtype: Dtype


class PointState(_Layers, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="point"):
    """What recurrent layers have after exactly n tokens; before the first token there is none. The axes of each part's
    shape, and their order, are the format's and not an engine's."""

    parts: Annotated[tuple[StatePart, ...], msgspec.Meta(min_length=1, max_length=8)]
    plain = False

    @property
    def num_blobs(self) -> int:
        return sum(part.num_heads for part in self.parts)

    @property
    def blobs(self) -> tuple[tuple[StatePart, int], ...]:
        """Each blob's part, and its bytes."""
        size = [self.num_layers * prod(part.shape) * DTYPE_BYTES[part.dtype] for part in self.parts]
        return tuple((part, n) for part, n in zip(self.parts, size, strict=True) for _ in range(part.num_heads))

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.blobs)

    def share(self, rank: int, num_ranks: int) -> tuple[range, ...]:
        """The blobs that a tensor-parallel rank holds, part by part."""
        begins = [0, *accumulate(part.num_heads for part in self.parts)]
        heads = [_heads(part.num_heads, rank, num_ranks) for part in self.parts]
        return tuple(range(at + own.start, at + own.stop) for (at, _), own in zip(pairwise(begins), heads, strict=True))

    def __str__(self) -> str:
        parts = ", ".join(f"{p.name} {p.num_heads} × {list(p.shape)} {p.dtype}" for p in self.parts)
        return f"{self.name}: {self.layers_text}, state of {parts}"


TokenGroup: TypeAlias = FullKV | SlidingKV | LatentKV
CacheGroup: TypeAlias = FullKV | SlidingKV | LatentKV | PointState


class Column(NamedTuple):
    """A blob of a token group, by its number there. A session's pages have one column for each."""

    group: TokenGroup
    number: int


def layers_of(layers: Sequence[int]) -> dict[str, Any]:
    """The fields that name these layers, which are in order."""
    named: dict[str, Any] = {"first_layer": layers[0], "num_layers": len(layers)}
    return named if layers[-1] - layers[0] == len(layers) - 1 else {**named, "layers": tuple(layers)}


def token_groups(groups: Sequence[CacheGroup]) -> tuple[TokenGroup, ...]:
    return tuple(group for group in groups if not isinstance(group, PointState))


def point_groups(groups: Sequence[CacheGroup]) -> tuple[PointState, ...]:
    return tuple(group for group in groups if isinstance(group, PointState))


def columns(groups: Sequence[CacheGroup]) -> tuple[Column, ...]:
    """All blobs that a whole segment has, group by group."""
    return tuple(Column(group, number) for group in token_groups(groups) for number in range(group.num_blobs))


def held(group: CacheGroup, rank: int, num_ranks: int) -> tuple[int, ...]:
    """The blobs of a group that a tensor-parallel rank holds, by their numbers."""
    share = group.share(rank, num_ranks)
    return tuple(share) if isinstance(share, range) else tuple(chain.from_iterable(share))


def check(groups: Sequence[CacheGroup]) -> None:
    """Raise `ValueError` unless names differ."""
    names = [group.name for group in groups]
    if len(set(names)) != len(names):
        raise ValueError(f"cache groups {names}: a name stands twice")


def is_plain(groups: Sequence[CacheGroup]) -> bool:
    """Whether format 1 can say them: full groups, K and V alike, of neighbouring layers."""
    return all(group.plain for group in groups)


def keeps_all(groups: Sequence[CacheGroup]) -> bool:
    """Whether any earlier token can be continued from, because every token's bytes are kept."""
    return all(isinstance(g, FullKV) or (isinstance(g, LatentKV) and g.window is UNSET) for g in groups)


def token_nbytes(groups: Sequence[CacheGroup]) -> int:
    """What one more token adds at most."""
    return sum(group.token_nbytes for group in token_groups(groups))


def nbytes_at(groups: Sequence[CacheGroup], num_kv: int) -> int:
    """What is needed to go on after `num_kv` tokens."""
    tokens = sum(group.token_nbytes * len(group.covers(num_kv)) for group in token_groups(groups))
    return tokens + (sum(group.nbytes for group in point_groups(groups)) if num_kv else 0)


def list_of(tokens: Collection[int]) -> str:
    """The tokens that something is kept at, the last of them where there are many."""
    last = sorted(tokens)[-8:]
    return f"{'… ' * (len(tokens) > len(last))}{', '.join(map(str, last))} tokens" if last else "no tokens"


def _window(num_kv: int, window: int) -> range:
    return range(max(0, num_kv - window + 1), num_kv)


def _heads(num_heads: int, rank: int, num_ranks: int) -> range:
    if num_heads >= num_ranks:
        each = num_heads // num_ranks
        return range(rank * each, (rank + 1) * each)
    one = rank * num_heads // num_ranks
    return range(one, one + 1)
