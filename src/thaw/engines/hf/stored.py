"""A model whose tensors lie in a store: what its folder says of them, and who reads them.

Such a folder has the model's small files and, in place of weight files, `thaw-weights.json`: the manifest of a weights
set, with the name, dtype, shape and hash of each tensor. So the root of its weights is known without a tensor being
read. Where the store is says `thaw-store.json`. The bytes are read by `thaw.weights`, which is above the engines: it is
named here as the registry names kinds of engines, and imported when tensors are wanted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from blake3 import blake3

from thaw.core.canonical import refuse_newer
from thaw.core.errors import CorruptBlob, IncompleteModel
from thaw.core.identity import weights_root
from thaw.core.ids import digest, is_id

if TYPE_CHECKING:
    import torch

MANIFEST = "thaw-weights.json"
PLACE = "thaw-store.json"
READER = "thaw.weights.tensors"
"""The module that reads a stored model's tensors: `of_folder(folder) -> iterator of (name, tensor)`."""
MAX_BYTES = 256 << 20
"""A manifest has at most so many: over a million tensors."""
TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip
"""safetensors' words for dtypes, and torch's."""
NBYTES = {"F64": 8, "F32": 4, "I64": 8, "I32": 4, "U32": 4, "U64": 8, "C64": 8}
NBYTES |= {word: 2 for word in ("F16", "BF16", "I16", "U16")}
NBYTES |= {word: 1 for word in ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0")}
Id = Annotated[str, msgspec.Meta(pattern=r"^b3:[0-9a-f]{64}$", max_length=67)]
FileName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_+. -]+(/[A-Za-z0-9_+. -]+)?$", max_length=200)]
"""Of a file beside the weights, perhaps in one folder; `check` refuses names that lead out of it."""
_LEADS_OUT = re.compile(r"(^|/)\.\.?(/|$)")


class StoredTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A tensor's bytes are the blob (None: it has no elements). `dtype`: in safetensors' word.

    `skew`: how many bytes behind a multiple of 64 it began in its file, and so in memory where the file is mapped. On a
    CPU the last bits of a matrix product depend on it.
    """

    blob: Id | None
    dtype: str
    shape: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)], ...], msgspec.Meta(max_length=8)]
    skew: Annotated[int, msgspec.Meta(ge=0, lt=64)] = 0

    def is_same(self, other: StoredTensor) -> bool:
        """Whether they are one tensor, wherever each lay."""
        return (self.blob, self.dtype, self.shape) == (other.blob, other.dtype, other.shape)

    @property
    def nbytes(self) -> int:
        total = NBYTES[self.dtype]
        for length in self.shape:
            total *= length
        return total


class StoredFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A small file of the model (None: an empty one)."""

    blob: Id | None
    nbytes: int


class WeightsManifest(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="thaw.weights/1", forbid_unknown_fields=True
):
    """A weights set. `weights`: the id that identities carry, of a model that runs in `dtype`.

    `tensors`: by the names that the files have. `leaves`: module's name -> file's name of each tensor that the id is
    the root of; empty where loading changes tensors (they are merged, cast, quantised): the id is then what was
    computed when the set was added, and holds for a model once it is loaded. An adapter's id is the root of its own
    tensors and config, and `base` the id of the weights that it was trained on, if that was told.
    """

    kind: Literal["model", "adapter"]
    weights: Id
    dtype: str
    architecture: str
    tensors: dict[str, StoredTensor]
    leaves: dict[str, str] = {}
    files: dict[FileName, StoredFile] = {}
    code: dict[FileName, Id] = {}
    base: Id | None = None

    @property
    def blobs(self) -> dict[str, int]:
        """Every blob of the set with its bytes."""
        named = [(one.blob, one.nbytes) for one in self.tensors.values()]
        named += [(one.blob, one.nbytes) for one in self.files.values()]
        return {blob: nbytes for blob, nbytes in named if blob is not None}

    @property
    def tensor_nbytes(self) -> int:
        """Of all tensors, equal ones once."""
        return sum({one.blob: one.nbytes for one in self.tensors.values()}.values())


_DECODER = msgspec.json.Decoder(WeightsManifest)


def encode(manifest: WeightsManifest) -> bytes:
    """Its only form. Raises `CorruptBlob` for one that could not be read again."""
    data = msgspec.json.encode(manifest, order="sorted")
    decode(data, "the manifest")
    return data


def decode(data: bytes, what: str) -> WeightsManifest:
    """Raises `CorruptBlob` naming what does not fit, `NewerFormat`."""
    if len(data) > MAX_BYTES:
        raise CorruptBlob(f"{what} has {len(data):,} bytes; a manifest of weights has {MAX_BYTES:,} at most")
    try:
        manifest = _DECODER.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        refuse_newer(data, what)
        raise CorruptBlob(f"{what} cannot be read: {error}") from None
    check(manifest, what)
    return manifest


def check(manifest: WeightsManifest, what: str) -> None:
    """That it is whole in itself. Raises `CorruptBlob`."""
    for name, tensor in manifest.tensors.items():
        if tensor.dtype not in NBYTES:
            raise CorruptBlob(f"{what}: tensor {name} has the dtype {tensor.dtype!r}, which this thaw does not know")
        if (tensor.blob is None) != (tensor.nbytes == 0):
            raise CorruptBlob(f"{what}: tensor {name} of shape {list(tensor.shape)} does not fit its blob")
    lost = sorted(set(manifest.leaves.values()) - manifest.tensors.keys())
    if lost:
        raise CorruptBlob(f"{what}: tensor {lost[0]} is missing")
    outside = [name for name in (*manifest.files, *manifest.code) if _LEADS_OUT.search(name)]
    if outside:
        raise CorruptBlob(f"{what}: {outside[0]!r} is no file of a model")
    if manifest.leaves and root(manifest) != manifest.weights:
        raise CorruptBlob(
            f"{what}: its tensors have the weights id {root(manifest)}, not {manifest.weights}: a name, dtype, shape "
            "or hash in it is not what was stored. Add the weights again"
        )


def root(manifest: WeightsManifest) -> str:
    """The weights id that its leaves make: `thaw.core.identity.weights_root` of the tensors, from their hashes."""
    return weights_root({name: leaf(name, manifest.tensors[at]) for name, at in manifest.leaves.items()})


def leaf(name: str, tensor: StoredTensor) -> bytes:
    """`thaw.core.identity.tensor_leaf` of a tensor whose bytes have this hash."""
    head = f"{name}\0{TORCH[tensor.dtype]}\0{','.join(map(str, tensor.shape))}\0".encode()
    hashed = blake3().digest() if tensor.blob is None else bytes.fromhex(tensor.blob.removeprefix("b3:"))
    return blake3(head + hashed).digest()


class StoredAt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the tensors lie. `store`: the repository, from the folder that says it. `commit`: what keeps the set."""

    store: str
    uuid: str
    commit: Id
    manifest: Id


def place_of(folder: Path) -> StoredAt:
    """Raises `IncompleteModel` where the folder does not say it."""
    path = folder / PLACE
    try:
        return msgspec.json.decode(path.read_bytes(), type=StoredAt)
    except (OSError, msgspec.DecodeError, ValueError) as error:
        raise IncompleteModel(f"{path} does not say where the tensors lie: {error}. {_again(folder)}") from None


def is_stored(folder: Path) -> bool:
    """Whether the tensors of the model in `folder` lie in a store."""
    return (folder / MANIFEST).is_file()


def manifest_of(folder: Path) -> WeightsManifest:
    """The manifest in a folder, which must be the one that its place names. Raises `IncompleteModel`, `CorruptBlob`."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise IncompleteModel(f"{path} cannot be read: {error}. {_again(folder)}") from None
    named = place_of(folder).manifest
    if digest(data) != named or not is_id(named):
        raise IncompleteModel(f"{path} hashes to {digest(data)}; {PLACE} names {named}. {_again(folder)}")
    return decode(data, str(path))


def _again(folder: Path) -> str:
    return f"Let thaw write {folder.name} again: name the set (--model thaw:NAME)"


def root_of_stored(folder: Path, dtype: str, overrides: Mapping[str, Any] | None = None) -> str:
    """The weights id of the stored model in `folder` when it runs in `dtype`. No tensor is read.

    Raises `IncompleteModel` where the set is of another dtype, or ties are not those that it was added with.
    """
    manifest = manifest_of(folder)
    if manifest.dtype != dtype:
        raise IncompleteModel(
            f"the weights set of {folder} is of a model that runs in {manifest.dtype}; this engine runs {dtype}. Start "
            f"it with dtype {manifest.dtype}, or add the model again: thaw weights add --dtype {dtype}"
        )
    if "tie_word_embeddings" in (overrides or {}):
        raise IncompleteModel(f"tie_word_embeddings was changed for {folder}; a stored model runs as its config says")
    return manifest.weights


def tensors_of(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the stored model in `folder`, each verified when it is handed on (`thaw.weights.tensors`)."""
    found: Iterator[tuple[str, torch.Tensor]] = import_module(READER).of_folder(folder)
    return found
