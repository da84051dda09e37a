"""Packs read by processes beside SGLang's scheduler: the laws of bytes and of proof."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from read_by_processes import NUM_READERS, ReadByProcessesTests
from thaw.engines import load_engine
from thaw.engines.base import Engine

pytest.importorskip("sglang")


class TestSglangReaders(ReadByProcessesTests):
    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls, tiny_model: Callable[..., Path]) -> Callable[..., Engine]:
        model = tiny_model("llama", dtype="bfloat16", head_dim=64)
        return partial(load_engine, "sglang", model=str(model), chunked_prefill_size=512, readers=NUM_READERS)
