"""Folders of a model of which engines would make different things: changes to a whole one, and how it is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

FILE, INDEX, NORM = "model.safetensors", "model.safetensors.index.json", "model.norm.weight"


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def _in_two_shards(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    (folder / FILE).rename(folder / "model-00001-of-00002.safetensors")
    save_file({NORM: tensors[NORM] * 5}, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    where = {**dict.fromkeys(tensors, "model-00001-of-00002.safetensors"), NORM: "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _of_int8(folder: Path) -> None:
    tensors: dict[str, Any] = load_file(folder / FILE)
    save_file({**tensors, NORM: tensors[NORM].char()}, folder / FILE, metadata={"format": "pt"})


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "ends cut short": (_write("generation_config.json", '{"eos_token_id": [65'), r"generation_config\.json .*not JSON"),
    "ends, no object": (_write("generation_config.json", "[]"), r"generation_config\.json holds no JSON object"),
    "an end by name": (_write("generation_config.json", '{"eos_token_id": "x"}'), r"generation_config\.json: Expected"),
    "config, no object": (_write("config.json", "[]"), r"config\.json holds no JSON object"),
    "tokens, no object": (_write("tokenizer_config.json", "[]"), r"tokenizer_config\.json holds no JSON object"),
    "tokenizer cut short": (_write("tokenizer.json", '{"version'), r"tokenizer\.json is no tokenizer"),
    "a tensor in two shards": (_in_two_shards, r"model\.norm\.weight is in model-00001-.* and in model-00002-"),
    "a norm of int8": (_of_int8, r"model\.norm\.weight in I8"),
    "a second model beside it": (
        lambda folder: shutil.copy(folder / FILE, folder / "other.safetensors"), "others that vLLM and SGLang load",
    ),
}  # fmt: skip


def damaged(whole: Path, folder: Path, name: str) -> Path:
    """A copy of `whole` in `folder` with that change."""
    shutil.copytree(whole, folder)
    DAMAGED[name][0](folder)
    return folder
