"""The law book on a GPU for SGLang: CUDA graphs and overlap scheduling on, pages of one token and of 16, on Triton's
attention and on FlashAttention 3. A server of its own processes, as `load_engine` starts it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import ClassVar

import pytest

from guarded import GuardedTests
from thaw.engines import load_engine
from thaw.engines.base import Engine

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")
if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

pytestmark = pytest.mark.gpu

USUAL: dict[str, object] = {
    "attention_backend": "triton", "sampling_backend": "pytorch", "grammar_backend": "none",
    "chunked_prefill_size": 512, "mem_fraction_static": 0.2, "max_total_tokens": 32_768,
    "cuda_graph_max_bs_decode": 32, "arena_nbytes": 1 << 30,
}  # fmt: skip
"""Small, so that several engines fit on one card and capture their graphs soon; what is not named is SGLang's own."""


class OnGpu(GuardedTests):
    options: ClassVar[dict[str, object]] = {}

    @classmethod
    def boot(cls, model: Path, **changes: object) -> Engine:
        return load_engine("sglang", **{"model": str(model), **USUAL, **cls.options, **changes})


class TestTriton(OnGpu):
    pass


class TestTritonPages(OnGpu):
    options: ClassVar[dict[str, object]] = {"page_size": 16}


NO_FA3 = importlib.util.find_spec("sgl_kernel.flash_ops") is None


@pytest.mark.skipif(NO_FA3, reason="sgl_kernel here is without FlashAttention 3")
class TestFlashAttention(OnGpu):
    options: ClassVar[dict[str, object]] = {"attention_backend": "fa3"}
