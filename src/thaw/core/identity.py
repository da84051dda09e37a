"""Model identity: what must be equal for KV to mean the same thing.

`weights` is a Merkle root over tensors (name, dtype, shape, bytes), whatever files they came in; `config` holds the
fields that change the function (resolved rope included); then the tokenizer, the adapter and the policy version.
`compare` names the first field that differs, with both values and the way out. The identity is an object of its
own; its id is in every state and at the root of every prefix hash.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from blake3 import blake3

from thaw.core.errors import IdentityMismatch, PolicyMismatch
from thaw.core.ids import digest

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}


class CacheGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Layers whose cache has one shape. `kind` "full": keys and values of every token.

    Layers are [first_layer, first_layer + num_layers); a blob holds one KV head:
    [num_layers][K|V][token][head_dim] in `dtype`, little-endian.
    """

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9_.-]{1,40}\Z")]
    kind: Literal["full"]
    first_layer: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: Literal["float32", "bfloat16", "float16", "uint8"]

    @property
    def token_nbytes_per_head(self) -> int:
        return self.num_layers * 2 * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def token_nbytes(self) -> int:
        """KV bytes of one token in this group, all heads."""
        return self.num_kv_heads * self.token_nbytes_per_head


class ModelIdentity(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="thaw.model/1", forbid_unknown_fields=True
):
    """What a state's KV depends on. `config` maps a field's name to its value as JSON text."""

    architecture: str
    weights: str
    config: dict[str, str]
    dtype: str
    tokenizer: str
    adapter: str | None = None
    policy: str = "0"
    groups: tuple[CacheGroup, ...]


_WAY_OUT = {
    "architecture": "Start the engine with the model that the snapshot was taken with",
    "weights": "Start the engine with the weights that the snapshot was taken with",
    "dtype": "Start the engine with dtype={stored}",
    "tokenizer": "Use the tokenizer that the snapshot was taken with",
    "adapter": "Load adapter {stored} (or none, if that is what it says)",
}


def compare(stored: ModelIdentity, running: ModelIdentity) -> None:
    """Raise for the first field in which a stored state and a running engine differ; return when none does."""
    for field in ("architecture", "dtype"):
        _same(field, getattr(stored, field), getattr(running, field))
    for name in sorted(stored.config.keys() | running.config.keys()):
        _same(f"config.{name}", stored.config.get(name), running.config.get(name))
    _same("tokenizer", stored.tokenizer, running.tokenizer)
    _same("adapter", stored.adapter, running.adapter)
    if stored.groups != running.groups:
        _same("cache layout", _layout(stored.groups), _layout(running.groups))
    if stored.policy != running.policy:
        raise PolicyMismatch(
            f"the snapshot's KV was computed under policy {stored.policy!r}; this engine runs policy "
            f"{running.policy!r}. Recompute it here (policy='recompute', --recompute), or set the engine's policy back."
        )
    _same("weights", stored.weights, running.weights)


def _layout(groups: tuple[CacheGroup, ...]) -> str:
    return "; ".join(
        f"{g.name}: layers {g.first_layer}..{g.first_layer + g.num_layers - 1}, {g.num_kv_heads} KV heads of "
        f"{g.head_dim}, {g.dtype}"
        for g in groups
    )


def _same(field: str, stored: str | None, running: str | None) -> None:
    if stored == running:
        return
    way_out = _WAY_OUT.get(field, "Start the engine with the same model configuration").format(stored=stored)
    raise IdentityMismatch(
        f"the snapshot was taken with {field} {stored}; this engine runs {running}. {way_out}, or allow recompute "
        "(policy='recompute', --recompute).",
        field=field,
        stored=str(stored),
        running=str(running),
    )


def tensor_leaf(name: str, dtype: str, shape: tuple[int, ...], data: bytes | bytearray | memoryview) -> bytes:
    """The leaf of one tensor: BLAKE3 of its name, dtype, shape and the hash of its bytes (little-endian, C order)."""
    head = f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode()
    return blake3(head + blake3(data).digest()).digest()


def weights_root(leaves: dict[str, bytes]) -> str:
    """The Merkle root of {tensor name: leaf}; independent of file sharding and order."""
    return digest(b"thaw.weights/1\0" + b"".join(leaves[name] for name in sorted(leaves)))
