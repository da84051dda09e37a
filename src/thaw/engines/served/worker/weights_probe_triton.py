"""A sample of every weight on a GPU by one launch. None is held: an engine that replaces one gets its memory back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _read(addresses, steps, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    tensor, sample = tl.program_id(0), tl.arange(0, N)
    start = tl.load(addresses + tensor).to(tl.pointer_type(tl.int16))
    tl.store(out + tensor * N + sample, tl.load(start + sample * tl.load(steps + tensor)))


class Peek:
    """Two bytes at each of `samples` places of every tensor (a power of two), spread over its memory.

    In the order of the current stream: changes queued before are seen."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._known: list[tuple[int, int]] = []

    def __call__(self, tensors: list[torch.Tensor]) -> bytes:
        found = [(tensor.data_ptr(), _room(tensor)) for tensor in tensors if tensor.nbytes >= 2]
        if found != self._known:
            device = tensors[0].device
            steps = [nbytes // 2 // self._samples for _, nbytes in found]
            self._addresses = torch.tensor([address for address, _ in found], dtype=torch.int64, device=device)
            self._steps = torch.tensor(steps, dtype=torch.int64, device=device)
            self._out = torch.empty(len(found), self._samples, dtype=torch.int16, device=device)
            self._known = found
        with torch.cuda.device(self._out.device):
            _read[(len(found),)](self._addresses, self._steps, self._out, self._samples)
        return self._out.cpu().numpy().tobytes()


def _room(tensor: torch.Tensor) -> int:
    """Bytes that may be read from the tensor's first element on: fewer than its own where it is an expanded view."""
    return int(min(tensor.nbytes, tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.itemsize))
