"""Small multimodal models as vLLM wants to see them: with what it reads of a processor, and Qwen3.5 with a tensor
of a drafter (MTP), as in its published files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from kind_models import make_kind_model

_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]}
_QWEN3_5 = {
    "head_dim": 64, "linear_key_head_dim": 64, "linear_value_head_dim": 64, "rope_parameters": {
        **_MROPE, "mrope_section": [2, 3, 3], "mrope_interleaved": True, "partial_rotary_factor": 0.25,
    },
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_vl": {"head_dim": 32, "rope_parameters": {**_MROPE, "mrope_interleaved": True}},
    "qwen2_5_vl": {"hidden_size": 128, "rope_parameters": _MROPE},
    "mistral3": {"head_dim": 32},
    "gemma3": {"head_dim": 64, "query_pre_attn_scalar": 1024},
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5,
}
"""Fields of the text part. vLLM's attention on a CPU takes heads of 32 numbers and more, and its delta rule of 64."""
_PATCHES = {
    "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "size": {"shortest_edge": 3136, "longest_edge": 12_845_056},
}  # fmt: skip
_QWEN = {
    "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", **_PATCHES},
    "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor", **_PATCHES},
}
_PROCESSORS: dict[str, dict[str, dict[str, Any]]] = {
    **dict.fromkeys(("qwen3_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe"), _QWEN),
    "gemma3": {"preprocessor_config.json": {"image_processor_type": "Gemma3ImageProcessor"}},
    "mistral3": {"preprocessor_config.json": {"image_processor_type": "PixtralImageProcessor", "patch_size": 14}},
}
_TOKENS = {
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    "mistral3": {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
}
"""Those that a processor looks for, the first of them where the config says an image is."""
_NEWLINES = {"gemma3": ["\n" * count for count in range(1, 5)]}
"""Tokens that vLLM looks for."""
DRAFTERS = ("qwen3_5", "qwen3_5_moe")


def make_multimodal(arch: str, folder: Path, *, dtype: str) -> Path:
    """The folder of a model of `SHAPES`, made if missing."""
    if (folder / "config.json").exists():
        return folder
    made = make_kind_model(arch, folder, dtype=dtype, **SHAPES[arch])
    for name, config in _PROCESSORS[arch].items():
        (made / name).write_text(json.dumps(config))
    if arch in _TOKENS:
        tokenizer = AutoTokenizer.from_pretrained(made, extra_special_tokens=_TOKENS[arch])
        tokenizer.add_tokens(_NEWLINES.get(arch, []))
        tokenizer.save_pretrained(made)
    if arch in DRAFTERS:
        _add_drafter(made / "model.safetensors", made / "config.json")
    return made


def _add_drafter(weights: Path, config: Path) -> None:
    """A tensor of it is enough: nobody reads its values."""
    tensors = load_file(weights)
    gain = next(tensor for name, tensor in tensors.items() if name.endswith("language_model.norm.weight"))
    save_file({**tensors, "mtp.norm.weight": gain.clone()}, weights, {"format": "pt"})
    said = json.loads(config.read_text())
    said["text_config"]["mtp_num_hidden_layers"] = 1
    config.write_text(json.dumps(said))
