"""Packs read by processes beside vLLM's worker: the laws of bytes and of proof."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from read_by_processes import NUM_READERS, ReadByProcessesTests
from thaw.engines import load_engine
from thaw.engines.base import Engine

pytest.importorskip("vllm")


class TestVllmReaders(ReadByProcessesTests):
    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls, tiny_model: Callable[..., Path]) -> Callable[..., Engine]:
        model = tiny_model("llama", dtype="bfloat16", head_dim=64)
        return partial(load_engine, "vllm", model=str(model), enforce_eager=True, readers=NUM_READERS)
