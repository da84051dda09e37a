"""Safetensors files as what is hashed of them: where each tensor's bytes lie.

Tensors are mapped, never copied into memory whole. Weights that are no safetensors files are refused: their bytes are
pickles, and no two programs read them alike.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from thaw.core.errors import IncompleteModel, Unsupported
from thaw.engines.hf.stored import NBYTES

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
