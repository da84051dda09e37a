"""What vLLM's code of some classes imports that vLLM's wheels for a CPU do not bring. No vLLM and no torch here."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from thaw.core.errors import NotFound
from thaw.engines.hf.config import model_type

TORCHVISION = "torchvision"
LOOKS_FOR_IMAGES = frozenset((
    "gemma3", "internvl", "lfm2_vl", "llama4", "llava", "mistral3", "pixtral", "qwen2_5_vl", "qwen2_vl", "qwen3_5",
    "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_vl", "qwen3_vl_moe",
))  # fmt: skip
"""Types of models whose code in vLLM 0.32 imports it, also where their text alone is run."""
ADVICE = (
    "vLLM's code of models of type {} imports torchvision, also where their text alone runs. Install the release that "
    "goes with vLLM's torch (pip install --no-deps torchvision==…); beside a torch for the CPU it needs one more "
    'thing: docs/engines/vllm.md, "Text of multimodal classes"'
)


def needs(model: str) -> dict[str, str]:
    """The modules that this model needs beside vLLM, each with why and what to do: of a folder, or a hub id that was
    fetched before."""
    kind = model_type(model)
    return {TORCHVISION: ADVICE.format(kind)} if kind in LOOKS_FOR_IMAGES else {}


def require(model: str) -> None:
    """Raise `NotFound` where this Python does not have what the model needs."""
    for module, advice in needs(model).items():
        if find_spec(module) is None:
            raise NotFound(f"this Python ({sys.executable}) does not have {module}. {advice}.")
