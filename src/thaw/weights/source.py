"""A model's folder as what a weights set is made of: where each tensor's bytes lie, the small files, the code.

Tensors are mapped, never copied into memory whole. Nothing is changed. Weights that are no safetensors files are
refused: their bytes are pickles, and no two programs read them alike.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from thaw.core.errors import IncompleteModel, Unsupported
from thaw.core.ids import digest
from thaw.data.locations import BlobLocation, is_pack_name
from thaw.engines.hf.beside import NAMES, PATTERNS, is_there
from thaw.engines.hf.stored import NBYTES, StoredTensor

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
MORE = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json")
"""Files that say how a model of several parts reads its input."""
CODE = "*.py"
_MAX_HEADER = 100_000_000


class TensorExtent(NamedTuple):
    """A tensor in a file: bytes [offset, offset + nbytes) of `path`. `dtype`: in safetensors' word."""

    path: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


class _Tensor(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_HEADER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TENSOR = msgspec.json.Decoder(_Tensor)


def extents(paths: list[Path]) -> dict[str, TensorExtent]:
    """Every tensor of safetensors files by its name. Raises `Unsupported` for other files, `IncompleteModel`."""
    found: dict[str, TensorExtent] = {}
    for path in paths:
        if path.suffix != ".safetensors":
            raise Unsupported(
                f"{path.name} is not a safetensors file: load the model with transformers and save it again "
                "(save_pretrained), then add that folder"
            )
        found.update(_extents(path))
    return found


def _extents(path: Path) -> Iterator[tuple[str, TensorExtent]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= _MAX_HEADER else b""
    size = path.stat().st_size
    try:
        tensors = {name: _TENSOR.decode(raw) for name, raw in _HEADER.decode(header).items() if name != "__metadata__"}
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise IncompleteModel(f"{path} does not begin with a safetensors header: {error}; get the file again") from None
    for name, one in tensors.items():
        if one.dtype not in NBYTES:
            raise Unsupported(f"{path.name}: tensor {name} has the dtype {one.dtype}, which thaw does not store yet")
        begin, end = one.data_offsets
        if not 0 <= begin <= end <= size - 8 - length:
            raise IncompleteModel(f"{path} ({size} bytes) ends before its tensor {name} does; get the file again")
        yield name, TensorExtent(path, 8 + length + begin, end - begin, one.dtype, one.shape)


def places(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, BlobLocation]:
    """Where the tensors of a linked set lie: by blob, in the files of its folder. Their bytes are verified when they
    are read, as those of packs are. Raises `IncompleteModel` naming a tensor that is not there as it was."""
    if not folder.is_dir():
        raise IncompleteModel(
            f"the tensors of this set are linked from {folder}, which is not there any more: bring the folder back, or "
            "remove the set and add the model again"
        )
    found = extents(sorted(folder.glob("*.safetensors")))
    out: dict[str, BlobLocation] = {}
    for name, one in tensors.items():
        there = found.get(name)
        if one.blob is None:
            continue
        if there is None or (there.dtype, there.shape) != (one.dtype, one.shape):
            what = "is not there" if there is None else f"is {there.dtype} {list(there.shape)}"
            raise IncompleteModel(f"tensor {name} of {folder} {what}: the files were changed after they were linked")
        out[one.blob] = BlobLocation(blob=one.blob, pack=there.path.name, offset=there.offset, nbytes=there.nbytes)
    return out


def require_linkable(found: Mapping[str, TensorExtent]) -> None:
    """Raises `Unsupported` for a file whose name no pack could have."""
    odd = sorted({one.path.name for one in found.values() if not is_pack_name(one.path.name)})
    if odd:
        raise Unsupported(f"{odd[0]} cannot be linked because of its name: add the model without --link")


@contextmanager
def mapped(found: dict[str, TensorExtent]) -> Iterator[dict[str, memoryview]]:
    """The bytes of each tensor, valid during the block."""
    views: list[memoryview] = []
    maps: dict[Path, mmap.mmap] = {}
    out: dict[str, memoryview] = {}
    try:
        for name, one in found.items():
            if one.path not in maps:
                with one.path.open("rb") as file:
                    maps[one.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                views.append(memoryview(maps[one.path]))
            whole = views[list(maps).index(one.path)]
            out[name] = whole[one.offset : one.offset + one.nbytes]
        yield out
    finally:
        for view in (*out.values(), *views):
            view.release()
        for one_map in maps.values():
            one_map.close()


def small_files(folder: Path, kind: str) -> dict[str, bytes]:
    """The files beside the weights that a boot may read, by their names in the folder."""
    if kind == "adapter":
        return {ADAPTER_CONFIG: (folder / ADAPTER_CONFIG).read_bytes()}
    more = (path for pattern in PATTERNS for path in sorted(folder.glob(pattern)))
    paths = [*(folder / name for name in (*NAMES, *MORE)), *more]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if is_there(path)}


def code_files(folder: Path) -> dict[str, str]:
    """The hash of each file of code that comes with the model. The code itself is not stored, and thaw runs none."""
    return {path.name: digest(path.read_bytes()) for path in sorted(folder.glob(CODE))}
