"""What a bench asks of the engine's workers, mixed into vLLM's (`worker_extension_cls="in_worker.InWorker"`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from thaw.core.ids import digest

EXTENSION = f"{__name__}.InWorker"
CALLER = "thaw-bench"


class InWorker:
    """Of a vLLM worker; what is about copies needs thaw's connector in it."""

    def thaw_watch(self, on: bool) -> None:
        """From now on keep what lies in the engine's blocks after every load, and what every save takes from them."""
        _Watch.switch(_side(), on)

    def thaw_seen(self, num_kv: int) -> list[str]:
        """The digest of what was kept of the first `num_kv` tokens, KV head by KV head of this rank. Raises
        `ValueError` where some of them were not copied."""
        return _Watch.of(_side()).heads(num_kv)

    def thaw_exchange(self, on: bool) -> int:
        """From now on this rank reads the next rank's blobs for its own (False: its own again): what a mix-up of ranks
        would do. Every blob is still verified against its hash. Returns the rank."""
        groups = _side()._packing._groups
        if on:
            groups.held = partial(_held_by, (groups._rank + 1) % groups._num_ranks, groups._num_ranks)
        else:
            del groups.held
        return int(groups._rank)

    def thaw_readers(self, count: int, processes: bool = False) -> int:
        """From now on a plan's blobs are read by so many threads, or by so many of the processes that the engine was
        booted with. Returns how many threads it was."""
        from thaw.engines.served.worker import pack_io

        side_by_side = _side()._packing.readers
        if side_by_side is not None:
            side_by_side.most = count if processes else 0
        before = pack_io.READERS
        if not processes:
            pack_io.READERS = count
        return before

    def thaw_memory(self) -> dict[str, int]:
        """Bytes of this worker's process: on its device, as the driver counts them (0 on a CPU), and in host memory,
        with what it shares with its readers (the arena is that then), and what is theirs alone."""
        side = _side_or_none()
        readers = None if side is None else side._packing.readers
        own = resident() + resident(kind="RssShmem")
        return {"gpu_nbytes": on_device(os.getpid()), "host_nbytes": own + sum(map(resident, _family(readers)))}


def resident(status: Path = Path("/proc/self/status"), *, kind: str = "RssAnon") -> int:
    """Bytes of private memory (RssShmem: shared) that a process has in RAM."""
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{kind}:"))
    return int(line.split()[1]) << 10


def _family(readers: Any) -> list[Path]:
    """The head of the readers and each of them, as `resident` takes them."""
    if readers is None or readers.pid is None:
        return []
    told = Path(f"/proc/{readers.pid}/task/{readers.pid}/children").read_text()
    return [Path(f"/proc/{pid}/status") for pid in (readers.pid, *told.split())]


def on_device(pid: int) -> int:
    """Bytes of GPU memory of a process, on all devices."""
    try:
        import pynvml
    except ImportError:
        return 0
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    running = [one for handle in handles for one in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    return sum(int(one.usedGpuMemory or 0) for one in running if one.pid == pid)


class _Watch:
    """Stands before a worker's copier. Blocks are read back through the copier's own save, behind the load."""

    _at: ClassVar[dict[int, _Watch]] = {}

    def __init__(self, copier: Any) -> None:
        self._copier, self._save, self._load, self._aside = copier, copier.save, copier.load, copier.load_aside
        self._pieces: list[Any] = []
        copier.save, copier.load, copier.load_aside = self._saved, self._loaded, self._loaded_aside

    @classmethod
    def switch(cls, side: Any, on: bool) -> None:
        former = cls._at.pop(id(side), None)
        if former is not None:
            del former._copier.save, former._copier.load, former._copier.load_aside
        if on:
            cls._at[id(side)] = cls(side._copier)

    @classmethod
    def of(cls, side: Any) -> _Watch:
        return cls._at[id(side)]

    def heads(self, num_kv: int) -> list[str]:
        import torch

        spans, at = [], 0
        for piece in sorted(self._pieces, key=lambda one: (one.start, -one.stop)):
            if piece.ready is not None:
                piece.ready()
            if piece.stop <= at or at >= num_kv:
                continue
            if piece.start > at:
                raise ValueError(f"tokens {at} to {piece.start} were not copied")
            end = min(piece.stop, num_kv)
            spans.append([piece.view(strip, at, end) for strip in range(len(piece.tensors))])
            at = end
        if at < num_kv:
            raise ValueError(f"of {num_kv} tokens {at} were copied")
        strips = [torch.cat(views, dim=3) for views in zip(*spans, strict=True)]
        return [_digest_of(strip[row]) for strip in strips for row in range(strip.shape[0])]

    def _saved(self, tables: Any, start: int, stop: int, caller: Any) -> list[Any]:
        out: list[Any] = self._save(tables, start, stop, caller)
        self._pieces += out
        return out

    def _loaded(self, tables: Any, record: Any, start: int, stop: int) -> None:
        self._load(tables, record, start, stop)
        self._look(tables, start, stop)

    def _loaded_aside(self, tables: Any, record: Any, start: int, stop: int, since: Any) -> None:
        self._aside(tables, record, start, stop, since)
        self._look(tables, start, stop)

    def _look(self, tables: Any, start: int, stop: int) -> None:
        pieces = self._save(tables, start, stop, CALLER)
        for piece in pieces:
            if piece.ready is not None:
                piece.ready()
        self._pieces += pieces


def _side_or_none() -> Any:
    """None in a vLLM without thaw."""
    from vllm.distributed.kv_transfer import has_kv_transfer_group

    return _side() if has_kv_transfer_group() else None


def _side() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()._worker


def _held_by(rank: int, num_ranks: int, group: Any) -> Sequence[int]:
    from thaw.core.cache import held

    return held(group, rank, num_ranks)


def _digest_of(tensor: Any) -> str:
    import torch

    return digest(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
