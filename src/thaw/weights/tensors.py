"""A weights set's tensors out of packs, verified while they stream: what every engine loads from.

Each blob is read into the tensor's own memory on the host, hashed there (BLAKE3, `thaw.data.reader`) and handed on only
when it has the hash that the manifest names. What copies it to a device comes after. Several batches are under way at a
time, and no more than `AHEAD_BYTES` of them wait for who takes them. A reader's lease holds gc off meanwhile.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from thaw.core.errors import CorruptBlob, IncompleteModel
from thaw.core.objects import Commit
from thaw.data.locations import BlobLocation
from thaw.data.pack import read_blobs
from thaw.engines.hf import stored
from thaw.engines.hf.stored import TORCH, StoredTensor, WeightsManifest
from thaw.store import Store
from thaw.weights import record, source

BATCH_BYTES = 32 << 20
"""Small tensors that lie one after the other are read together."""
AHEAD_BYTES = 512 << 20
"""Read ahead of who takes them, at most (or one tensor)."""
THREADS = min(8, os.cpu_count() or 1)
Wanted = Callable[[str], bool]


class _Blob(NamedTuple):
    """A blob and the tensors that it is."""

    place: BlobLocation
    tensors: list[tuple[str, StoredTensor]]


def of_folder(folder: Path, wanted: Wanted | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor on the CPU) of the stored model in `folder`, in the order in which they lie in packs; those that
    `wanted` refuses are not read. Raises `IncompleteModel` where the store is not there or is another,
    `CorruptBlob` naming tensor, pack and blob."""
    at, manifest = stored.place_of(folder), stored.manifest_of(folder)
    path = (folder / at.store).resolve()
    with Store.open(path) as whole:
        if whole.uuid != at.uuid:
            raise IncompleteModel(f"{path} is another repository than the one that {folder} belongs to")
        store = record.view(whole)
        if not store.has(at.commit):
            raise IncompleteModel(f"the weights set of {folder} was removed from {path}: add the model again")
        with store.reading(at.commit):
            yield from stream(store, manifest, wanted, link=store.get_as(at.commit, Commit).meta.get("link"))


def stream(
    store: Store,
    manifest: WeightsManifest,
    wanted: Wanted | None = None,
    *,
    link: str | None = None,
    threads: int = THREADS,
    pinned: bool | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """As `of_folder`, of a store that is open and held. Tensors that are one blob share their memory. `link`: the
    folder that has the tensors of a linked set. `pinned`: in page-locked memory, which torch uses again and a GPU
    copies from faster; None: where this process has initialised CUDA."""
    pin = bool(torch.cuda.is_initialized()) if pinned is None else pinned  # type: ignore[no-untyped-call]
    chosen = {name: one for name, one in manifest.tensors.items() if wanted is None or wanted(name)}
    yield from ((name, _empty(one)) for name, one in chosen.items() if one.blob is None)
    batches = list(_batches(_blobs(store, chosen, link)))
    packs = store.packs if link is None else Path(link)
    with ThreadPoolExecutor(threads, thread_name_prefix="thaw-weights") as pool:
        waiting: deque[tuple[int, Future[list[tuple[str, torch.Tensor]]]]] = deque()
        held, at = 0, 0
        try:
            while at < len(batches) or waiting:
                while at < len(batches) and (not waiting or held < AHEAD_BYTES) and len(waiting) < 4 * threads:
                    nbytes = sum(one.place.nbytes for one in batches[at])
                    waiting.append((nbytes, pool.submit(_read, packs, batches[at], pin)))
                    held, at = held + nbytes, at + 1
                nbytes, done = waiting.popleft()
                found = done.result()
                del done
                held -= nbytes
                while found:
                    yield found.pop(0)
        finally:
            for _, left in waiting:
                left.cancel()


def _blobs(store: Store, tensors: dict[str, StoredTensor], link: str | None) -> list[_Blob]:
    """The blobs that they are, in the order in which these lie. Raises `CorruptBlob` naming a tensor that no pack
    holds."""
    named: dict[str, list[tuple[str, StoredTensor]]] = {}
    for name, one in tensors.items():
        if one.blob is not None:
            named.setdefault(one.blob, []).append((name, one))
    try:
        places = store.locate(named) if link is None else source.places(Path(link), tensors)
    except CorruptBlob as error:
        raise _naming(error, named) from None
    found = [_Blob(places[blob], of) for blob, of in named.items()]
    for place, of in found:
        if any(one.nbytes != place.nbytes for _, one in of):
            raise CorruptBlob(f"tensor {of[0][0]}: blob {place.blob} has {place.nbytes} bytes, not {of[0][1].nbytes}")
    return sorted(found, key=lambda one: (one.place.pack, one.place.offset))


def _batches(blobs: Sequence[_Blob]) -> Iterator[list[_Blob]]:
    some: list[_Blob] = []
    for one in blobs:
        together = sum(other.place.nbytes for other in some) + one.place.nbytes
        if some and (together > BATCH_BYTES or some[0].place.pack != one.place.pack):
            yield some
            some = []
        some.append(one)
    if some:
        yield some


def _read(packs: Path, batch: Sequence[_Blob], pin: bool) -> list[tuple[str, torch.Tensor]]:
    """Every tensor of the batch, verified."""
    out, targets = list[tuple[str, torch.Tensor]](), list[tuple[BlobLocation, memoryview | None]]()
    for place, of in batch:
        memory = _memory(place.nbytes, of[0][1], pin)
        targets.append((place, memoryview(memory.numpy())))  # type: ignore[arg-type]
        out += [(name, memory.view(_dtype(one)).reshape(one.shape)) for name, one in of]
    try:
        read_blobs(packs, targets)
    except CorruptBlob as error:
        raise _naming(error, {place.blob: of for place, of in batch}) from None
    return out


def _memory(nbytes: int, one: StoredTensor, pin: bool) -> torch.Tensor:
    """Bytes that begin where the tensor did in its mapped file, modulo 64: so that products on a CPU round alike."""
    memory = torch.empty(nbytes + 64, dtype=torch.uint8, pin_memory=pin)
    skew = one.skew if one.skew % stored.NBYTES[one.dtype] == 0 else 0
    start = (skew - memory.data_ptr()) % 64
    return memory[start : start + nbytes]


def _naming(error: CorruptBlob, named: dict[str, list[tuple[str, StoredTensor]]]) -> CorruptBlob:
    """The same error, with the tensor that it is of."""
    hit = next((of[0][0] for blob, of in named.items() if blob in str(error)), None)
    return type(error)(str(error) if hit is None else f"tensor {hit}: {error}")


def _dtype(one: StoredTensor) -> torch.dtype:
    found: torch.dtype = getattr(torch, TORCH[one.dtype])
    return found


def _empty(one: StoredTensor) -> torch.Tensor:
    return torch.empty(one.shape, dtype=_dtype(one))
