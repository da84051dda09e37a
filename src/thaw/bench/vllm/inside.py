"""Copies alone, in the engine's workers: thaw's own between the arena and the engine's blocks, and the bus by itself.

vLLM mixes `Copies` into its workers (`worker_extension_cls`); the client asks by `copy_alone`. The engine must have
nothing else to do. What lies in its blocks afterwards is what lay there before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from thaw.bench.sample import Sample
from thaw.core.ids import digest

if TYPE_CHECKING:
    import torch

    from thaw.engines.served.client.engine import ServedEngine
    from thaw.engines.served.worker.host_cache import HostRecord

EXTENSION = "thaw.bench.vllm.inside.Copies"
WAYS = ("load", "save", "bus-in", "bus-out")
CALLER = "thaw-bench"


def copy_alone(engine: ServedEngine, way: str, num_tokens: int, *, look: bool = True) -> Sample:
    """One copy of so many tokens (whole blocks of them) on every worker: `copy_s` of the slowest one, `nbytes` of all.
    With `look`, `load` and `save` have a digest of the bytes that are there after it."""
    told = engine.collective_rpc("thaw_bench_copy", (way, num_tokens, look and way in ("load", "save")))
    seconds, nbytes = max(one["seconds"] for one in told), sum(one["nbytes"] for one in told)
    found = "".join(one.get("bytes", "") for one in told)
    outputs = {"bytes": digest(found.encode())} if found else {}
    return Sample(values={"copy_s": seconds, "nbytes": float(nbytes), "rate": nbytes / seconds}, outputs=outputs)


class Copies:
    """Of a vLLM worker with thaw's connector."""

    def thaw_bench_copy(self, way: str, num_tokens: int, look: bool) -> dict[str, Any]:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return _Alone(get_kv_transfer_group()._worker, num_tokens).measure(way, look)


class _Alone:
    """The first `num_tokens` tokens' worth of blocks of one worker, from block 1 on (vLLM never gives block 0)."""

    def __init__(self, side: Any, num_tokens: int) -> None:
        self._copier, self._arena = side._copier, side._arena
        first = self._copier._layouts[0]
        count = min(num_tokens // first.block_size, first.num_blocks - 1)
        self._stop, self._on_card, self._device = count * first.block_size, first.on_its_own, first.device
        self._tables = (tuple(range(1, count + 1)),) * len(self._copier._layouts)
        self._record = _record_of(self._save())

    def measure(self, way: str, look: bool) -> dict[str, Any]:
        nbytes = sum(tensor.nbytes for piece in self._record.pieces for tensor in piece.tensors)
        work = {"load": self._load, "save": self._save, "bus-in": self._bus(True), "bus-out": self._bus(False)}[way]
        work()
        if look and way == "load":
            self._blank()
        seconds = _timed(work)
        told: dict[str, Any] = {"seconds": seconds, "nbytes": nbytes}
        if look:
            told["bytes"] = _digest_of(_record_of(self._save()) if way == "load" else self._record)
        return told

    def _save(self) -> tuple[Any, ...]:
        pieces = self._copier.save(self._tables, 0, self._stop, CALLER)
        for piece in pieces:
            if piece.ready is not None:
                piece.ready()
        return tuple(pieces)

    def _load(self) -> None:
        self._copier.load_aside(self._tables, self._record, 0, self._stop, self._copier.point())

    def _blank(self) -> None:
        """Zeros in the blocks, so that a load which left them alone would be seen."""
        from thaw.engines.served.worker.host_cache import Piece

        tensors = self._arena.allocate(self._stop, CALLER)
        for tensor in tensors:
            tensor.zero_()
        zeros = _record_of((Piece(0, self._stop, tensors),))
        self._copier.load_aside(self._tables, zeros, 0, self._stop, self._copier.point())

    def _bus(self, inward: bool) -> Callable[[], None]:
        """The same host memory to a buffer of the device's, or back, in one copy for each of its tensors."""
        import torch

        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()

        def work() -> None:
            nonlocal pairs
            if not pairs:
                host = [tensor for piece in self._record.pieces for tensor in piece.tensors]
                pairs = [(one, torch.empty_like(one, device=self._device)) for one in host]
                if not inward:
                    pairs = [(there.copy_(here), here) for here, there in pairs]
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            if self._on_card:
                torch.cuda.synchronize(self._device)

        return work


def _record_of(pieces: tuple[Any, ...]) -> HostRecord:
    from thaw.engines.served.worker.host_cache import HostRecord

    return HostRecord(pieces, 0, caller=CALLER)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _digest_of(record: HostRecord) -> str:
    import torch

    tensors = [tensor for piece in record.pieces for tensor in piece.tensors]
    return digest("".join(digest(memoryview(t.view(-1).view(torch.uint8).numpy().data)) for t in tensors).encode())
