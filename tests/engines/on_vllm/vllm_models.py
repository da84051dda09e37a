"""Any of the small models as vLLM runs it: its files, and what vLLM must be told beside them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from multimodal import SHAPES as MULTIMODAL
from multimodal import make_multimodal
from vllm_shapes import LATENT, V3, make_shaped

from kind_models import make_kind_model
from thaw.engines.vllm.vision import LOOKS_FOR_IMAGES, TORCHVISION


def require_vision(arch: str) -> None:
    """The test is over where vLLM could not look at a model of this kind."""
    if arch in LOOKS_FOR_IMAGES and importlib.util.find_spec(TORCHVISION) is None:
        pytest.skip(f"vLLM does not look at such a class without {TORCHVISION}")


def make_for_vllm(arch: str, folder: Path) -> Path:
    """Of a multimodal class, with latents, or of the other shapes. In bfloat16."""
    require_vision(arch)
    if arch in MULTIMODAL:
        return make_multimodal(arch, folder, dtype="bfloat16")
    if arch == "deepseek_v3":
        return make_kind_model(arch, folder, dtype="bfloat16", **LATENT | V3)
    return make_shaped(arch, folder, dtype="bfloat16")


def options_of(arch: str, **more: Any) -> dict[str, Any]:
    text = {"language_model_only": True} if arch in MULTIMODAL else {}
    return {"enforce_eager": True, "max_model_len": 2048, **text, **more}
