"""A rope that is stretched as model cards say it has its positions here, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import stretched_rope

pytest.importorskip("vllm")


def test_a_session_may_be_as_long_as_a_stretched_rope(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = stretched_rope.stretched(tiny_model("llama", dtype="float32", head_dim=64), tmp_path / "model")
    stretched_rope.check("vllm", folder, enforce_eager=True, num_gpu_blocks_override=32)
