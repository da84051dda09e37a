"""Model identity: what must be equal for KV to mean the same thing.

`weights` is a Merkle root over tensors (name, dtype, shape, bytes), whatever files they came in; `config` holds the
fields that change the function (resolved rope included); then the tokenizer, the adapter and the policy version.
`compare` names the first field that differs, with both values and the way out. The identity is an object of its
own; its id is in every state and at the root of every prefix hash.
"""

from __future__ import annotations

import msgspec
from blake3 import blake3

from thaw.core import cache
from thaw.core.cache import CacheGroup
from thaw.core.errors import IdentityMismatch, PolicyMismatch
from thaw.core.ids import digest


class ModelIdentity(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="thaw.model/1", forbid_unknown_fields=True
):
    """What a state's KV depends on. `config` maps a field's name to its value as JSON text.

    Format 1: its groups are plain full ones. `identity_of` takes any.
    """

    architecture: str
    weights: str
    config: dict[str, str]
    dtype: str
    tokenizer: str
    adapter: str | None = None
    policy: str = "0"
    groups: tuple[CacheGroup, ...]

    def __post_init__(self) -> None:
        cache.check(self.groups)
        if cache.is_plain(self.groups) != (type(self) is ModelIdentity):
            raise ValueError("plain full cache groups, and they alone, are written as thaw.model/1")


class GroupedIdentity(ModelIdentity, frozen=True, kw_only=True, tag="thaw.model/2"):
    """A model that has a cache group of another kind than plain full ones."""


def identity_of(
    *,
    architecture: str,
    weights: str,
    config: dict[str, str],
    dtype: str,
    tokenizer: str,
    adapter: str | None = None,
    policy: str = "0",
    groups: tuple[CacheGroup, ...],
) -> ModelIdentity:
    """A model's identity, in the oldest format that can say it."""
    kind = ModelIdentity if cache.is_plain(groups) else GroupedIdentity
    return kind(
        architecture=architecture, weights=weights, config=config, dtype=dtype, tokenizer=tokenizer, adapter=adapter,
        policy=policy, groups=groups,
    )  # fmt: skip


_WAY_OUT = {
    "architecture": "Start the engine with the model that the snapshot was taken with",
    "weights": "Start the engine with the weights that the snapshot was taken with",
    "dtype": "Start the engine with dtype={stored}",
    "tokenizer": "Use the tokenizer that the snapshot was taken with",
    "adapter": "Load adapter {stored} (or none, if that is what it says)",
}


def compare(stored: ModelIdentity, running: ModelIdentity, *, stale_kv: bool = False) -> None:
    """Raise for the first field in which a stored state and a running engine differ; return when none does. With
    `stale_kv` the policy and the weights may be others; nothing else may."""
    for field in ("architecture", "dtype"):
        _same(field, getattr(stored, field), getattr(running, field))
    for name in sorted(stored.config.keys() | running.config.keys()):
        _same(f"config.{name}", stored.config.get(name), running.config.get(name))
    _same("tokenizer", stored.tokenizer, running.tokenizer)
    _same("adapter", stored.adapter, running.adapter)
    if stored.groups != running.groups:
        _same("cache layout", _layout(stored.groups), _layout(running.groups))
    if stale_kv:
        return
    if stored.policy != running.policy:
        raise PolicyMismatch(
            f"the snapshot's KV was computed under policy {stored.policy!r}; this engine runs policy "
            f"{running.policy!r}. Recompute it here (policy='recompute', --recompute), or set the engine's policy back."
        )
    _same("weights", stored.weights, running.weights)


def _layout(groups: tuple[CacheGroup, ...]) -> str:
    return "; ".join(map(str, groups))


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
