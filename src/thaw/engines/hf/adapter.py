"""A LoRA adapter's folder: its id, which is that of its content and not of its name.

The folder is as PEFT writes it: `adapter_config.json`, and tensors in a safetensors file.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from thaw.core.errors import IncompleteModel, NotFound
from thaw.core.identity import weights_root
from thaw.core.ids import TAG, digest
from thaw.engines.hf import stored
from thaw.engines.hf.extents import TensorExtent, extents
from thaw.engines.hf.stored import StoredTensor

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"


def adapter_id(tensors: Mapping[str, StoredTensor], config: bytes) -> str:
    """The id of an adapter: the root of its tensors' leaves and its config's, named as its file."""
    leaves = {name: stored.leaf(name, one) for name, one in tensors.items()}
    text = StoredTensor(digest(config), "U8", (len(config),))
    return weights_root({**leaves, ADAPTER_CONFIG: stored.leaf(ADAPTER_CONFIG, text)})


def id_of(folder: Path) -> str:
    """The id of the adapter in a folder, of all its bytes. They are read and not mapped: whoever has a file mapped that
    is cut short ends. Raises `NotFound`, `IncompleteModel`, `Unsupported`."""
    config, _ = config_of(folder)
    path = weights_file(folder)
    found = extents([path])
    with path.open("rb", buffering=0) as file:
        return adapter_id(hashed(found, lambda name: _read(file.fileno(), found[name])), config)


def _read(file: int, one: TensorExtent) -> bytearray:
    data = bytearray()
    while len(data) < one.nbytes:
        more = os.pread(file, one.nbytes - len(data), one.offset + len(data))
        if not more:
            raise IncompleteModel(f"{one.path} changes while it is read, and ends too soon; wait until it is written")
        data += more
    return data


def weights_file(folder: Path) -> Path:
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise IncompleteModel(f"{folder} has {ADAPTER_CONFIG} and no {ADAPTER_FILE}; get the files again")
    return path


def config_of(folder: Path) -> tuple[bytes, str]:
    """The config's bytes, and the adapter's kind ("LORA")."""
    path = folder / ADAPTER_CONFIG
    try:
        config = path.read_bytes()
    except OSError as error:
        raise NotFound(f"there is no adapter in {folder}: {ADAPTER_CONFIG} cannot be read ({error.strerror})") from None
    try:
        said: Any = msgspec.json.decode(config)
        return config, str(said.get("peft_type") or "adapter")
    except (msgspec.DecodeError, AttributeError, RecursionError) as error:
        raise IncompleteModel(f"{path} is not an adapter's config: {error}") from None


def hashed(found: Mapping[str, TensorExtent], read: Callable[[str], bytearray | memoryview]) -> dict[str, StoredTensor]:
    """Each tensor with the hash of its bytes."""

    def one(name: str) -> str | None:
        data = read(name)
        return digest(data) if data else None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="thaw-hash") as pool:
        ids = dict(zip(found, pool.map(one, found), strict=True))
    return {name: StoredTensor(ids[name], one.dtype, one.shape, one.offset % 64) for name, one in found.items()}


def signature(folder: Path) -> tuple[tuple[int, int, int], ...]:
    """What changes when the folder's files are written anew: inode, size and time of each."""
    found = []
    for name in (ADAPTER_CONFIG, ADAPTER_FILE):
        try:
            said = (folder / name).stat()
        except OSError:
            found.append((0, 0, 0))
        else:
            found.append((said.st_ino, said.st_size, said.st_mtime_ns))
    return tuple(found)


def kept_copy(folder: Path, root: Path) -> tuple[str, Path]:
    """The id of the adapter in `folder`, and a copy of it below `root` in a folder called by its id: whatever becomes
    of the first, what is read from there is what the id says."""
    config_of(folder)
    root.mkdir(mode=0o700, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=root))
    try:
        for name in (ADAPTER_CONFIG, weights_file(folder).name):
            shutil.copyfile(folder / name, made / name)
        found = id_of(made)
        place = root / found.removeprefix(TAG)
        if not place.exists():
            try:
                made.rename(place)
            except OSError:
                if not place.is_dir():  # another client has made it just now
                    raise
        return found, place
    finally:
        shutil.rmtree(made, ignore_errors=True)
