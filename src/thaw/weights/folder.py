"""Folders of a stored model: the one that engines open, and a plain one that needs no thaw.

An engine's folder lies in the repository, at `models/NAME`, and has the small files, the manifest and where the store
is: from there, so that a repository that was moved or copied is found. It is written whenever the set is named, and
holds nothing that the store has not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import BinaryIO

import msgspec

from thaw.core.errors import Conflict, StorageFailed
from thaw.core.ids import CommitId
from thaw.data.files import storage_errors, write_atomic
from thaw.data.locations import BlobLocation
from thaw.data.pack import read_blob
from thaw.data.private import make_private
from thaw.engines.hf import stored
from thaw.engines.hf.stored import StoredAt, WeightsManifest
from thaw.store import Store
from thaw.weights import record, source
from thaw.weights.record import WeightsEntry

MODELS = "models"
SCHEME = "thaw:"
"""`thaw:NAME` is a stored model wherever an engine takes a model."""


def engine_folder(store: Store, entry: WeightsEntry) -> Path:
    """The folder by which engines open the set. Written where it is not as it should be; several may do so at once."""
    folder = store.path.resolve() / MODELS / entry.name
    if folder.exists() and any(folder.iterdir()) and not _is_ours(folder):
        raise Conflict(
            f"{folder} was not made by thaw: move it elsewhere, because thaw writes the folder of {entry.name!r} there"
        )
    make_private(folder)
    if not _is_ours(folder):
        _write(folder / stored.PLACE, b"{}")  # whose it is, from here on
    seen = record.view(store)
    manifest = record.manifest(seen, CommitId(entry.commit))
    at = StoredAt(store=os.path.join("..", ".."), uuid=store.uuid, commit=entry.commit, manifest=entry.manifest)
    files = _small(seen, manifest)
    for old in folder.rglob("*"):
        if old.is_file() and old.relative_to(folder).as_posix() not in (*files, stored.MANIFEST, stored.PLACE):
            old.unlink(missing_ok=True)
    for name, data in files.items():
        _write(folder / name, data)
    _write(folder / stored.MANIFEST, stored.encode(manifest))
    _write(folder / stored.PLACE, msgspec.json.encode(at))
    return folder


def remove_engine_folder(store: Store, name: str) -> None:
    folder = store.path.resolve() / MODELS / name
    if _is_ours(folder):
        shutil.rmtree(folder)


def _is_ours(folder: Path) -> bool:
    return (folder / stored.PLACE).is_file()


def _write(path: Path, data: bytes) -> None:
    with contextlib.suppress(OSError):
        if path.read_bytes() == data:
            return
    with storage_errors(path, "write"):
        path.parent.mkdir(mode=0o700, exist_ok=True)
    write_atomic(path, data)


def _small(store: Store, manifest: WeightsManifest) -> dict[str, bytes]:
    """The small files, verified."""
    places = store.locate([one.blob for one in manifest.files.values() if one.blob is not None])
    return {
        name: b"" if one.blob is None else read_blob(store.packs, places[one.blob])
        for name, one in manifest.files.items()
    }


def checkout(store: Store, entry: WeightsEntry, folder: Path) -> int:
    """A plain folder, as the hub has them: the small files and one safetensors file. Every byte is verified on its way.
    Bytes of tensors written. Raises `Conflict` where something is there; on an error the folder is removed."""
    if folder.exists() and any(folder.iterdir()):
        raise Conflict(f"{folder} is not empty. Check the weights out into a folder of their own.")
    seen = record.view(store)
    with seen.reading(entry.commit):
        manifest = record.manifest(seen, CommitId(entry.commit))
        with storage_errors(folder, "write"):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            for name, data in _small(seen, manifest).items():
                _write(folder / name, data)
            name = source.ADAPTER_FILE if manifest.kind == "adapter" else "model.safetensors"
            return _safetensors(seen, manifest, folder / name, entry.link)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _safetensors(store: Store, manifest: WeightsManifest, path: Path, link: str | None) -> int:
    header, places = _header(store, manifest, link)
    packs = store.packs if link is None else Path(link)
    with storage_errors(path, "write"), path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        nbytes = sum(_copied(packs, place, file) for place in places)
        file.flush()
        os.fsync(file.fileno())
    return nbytes


def _header(store: Store, manifest: WeightsManifest, link: str | None) -> tuple[bytes, list[BlobLocation]]:
    """The header of a safetensors file with all tensors, and what follows it. Two names of one blob are two tensors."""
    blobs = {one.blob for one in manifest.tensors.values() if one.blob is not None}
    located = store.locate(blobs) if link is None else source.places(Path(link), manifest.tensors)
    said: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, at = [], 0
    order = sorted(manifest.tensors.items(), key=lambda one: (-stored.NBYTES[one[1].dtype], one[0]))
    for name, one in order:
        said[name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": (at, at + one.nbytes)}
        at += one.nbytes
        if one.blob is not None:
            places.append(located[one.blob])
    text = msgspec.json.encode(said)
    return text + b" " * (-len(text) % 8), places


def _copied(packs: Path, place: BlobLocation, file: BinaryIO) -> int:
    data = read_blob(packs, place)
    if file.write(data) != place.nbytes:
        raise StorageFailed(f"cannot write {file.name}: the disk is full")
    return place.nbytes
