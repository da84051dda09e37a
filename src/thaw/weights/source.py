"""A model's folder as what a weights set is made of: where each tensor's bytes lie, the small files, the code.

Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from thaw.core.errors import IncompleteModel, Unsupported
from thaw.core.ids import digest
from thaw.data.locations import BlobLocation, is_pack_name
from thaw.engines.hf.adapter import ADAPTER_CONFIG, ADAPTER_FILE
from thaw.engines.hf.beside import NAMES, PATTERNS, is_there
from thaw.engines.hf.extents import TensorExtent, extents, mapped
from thaw.engines.hf.stored import StoredTensor

__all__ = ["ADAPTER_CONFIG", "ADAPTER_FILE", "TensorExtent", "extents", "mapped"]
MORE = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json")
"""Files that say how a model of several parts reads its input."""
CODE = "*.py"


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
