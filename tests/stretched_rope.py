"""A model whose rope is stretched as model cards say it: yarn is added to its config.json, and the number of positions
there is left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from thaw.core.errors import InvalidRequest
from thaw.engines import load_engine
from thaw.engines.base import GenerateRequest
from thaw.testing.laws.kit import LIMIT_S, greedy, ids

OWN, FACTOR = 256, 4
LENGTH = OWN * FACTOR


def stretched(model: Path, folder: Path) -> str:
    """A copy of a small Llama in `folder`, with `LENGTH` positions."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = {"rope_type": "yarn", "factor": float(FACTOR), "original_max_position_embeddings": OWN}
    config |= {"max_position_embeddings": OWN, "rope_parameters": {**config["rope_parameters"], **rope}}
    path.write_text(json.dumps(config))
    return str(folder)


def check(kind: str, folder: str, **options: Any) -> None:
    """The engine takes a session as long as the rope is, says what the stock model says of it, and none longer."""
    import torch
    from transformers import AutoModelForCausalLM

    prompt, count = ids(OWN + 300), 8
    with load_engine(kind, model=folder, max_model_len=LENGTH, dtype="float32", **options) as engine:
        assert engine.info.max_model_len > OWN + 300 + count
        session = engine.open()
        asked = GenerateRequest(session=session, prompt=tuple(prompt), sampling=greedy(count))
        (told,) = engine.generate([asked]).result(LIMIT_S)
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        whole = module.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    assert list(told.token_ids) == whole[0, len(prompt) :].tolist()
    with pytest.raises(InvalidRequest, match=f"{LENGTH} positions"):
        load_engine(kind, model=folder, max_model_len=LENGTH + 1, **options)
