"""The identity of a transformers model: weights hashed tensor by tensor, and the config that changes the function.

The weights' root is cached beside the weights (or in the user's cache folder), keyed by every weight file's path, size
and mtime and by the dtype it was loaded in, so that a second boot does not hash again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from thaw.core.identity import CacheGroup, ModelIdentity, tensor_leaf, weights_root
from thaw.core.ids import digest, is_id
from thaw.engines.transformers.codec import TransformersCodec
from thaw.engines.transformers.loading import LoadedModel

CACHE_NAME = ".thaw-weights.json"
_NOT_FUNCTION = frozenset(
    (
        "_attn_implementation",
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "cross_attention_hidden_size",
        "dtype",
        "eos_token_id",
        "experts_implementation",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "use_cache",
    )
)
"""Config fields that do not change what the model computes for given tokens."""


def model_identity(loaded: LoadedModel, codec: TransformersCodec, group: CacheGroup, *, fresh: bool) -> ModelIdentity:
    """Hash the model as it is. `fresh`: the weights changed in memory, so no cached root is used or written."""
    module = loaded.module
    config = {k: v for k, v in module.config.to_dict().items() if k not in _NOT_FUNCTION}
    return ModelIdentity(
        architecture=type(module).__name__,
        weights=_root(loaded, fresh),
        config={k: json.dumps(v, sort_keys=True, default=str) for k, v in sorted(config.items())},
        dtype=str(module.dtype).removeprefix("torch."),
        tokenizer=codec.identity(),
        groups=(group,),
    )


def sample_weights(module: Any) -> str:
    """A digest of 16 elements of every parameter and buffer, spread over it: cheap; any ordinary update changes it."""
    hasher = blake3()
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            flat = tensor.detach().reshape(-1)
            picked = flat[:: max(1, flat.numel() // 16)][:16].contiguous()
            hasher.update(_raw(picked))
    return hasher.hexdigest()


def _root(loaded: LoadedModel, fresh: bool) -> str:
    key = None if fresh or loaded.folder is None else _files_key(loaded.folder, loaded.module.dtype)
    if key is not None:
        known = _cached(loaded.folder, key)  # type: ignore[arg-type]
        if known is not None:
            return known
    root = hash_weights(loaded.module)
    if key is not None:
        _remember(loaded.folder, key, root)  # type: ignore[arg-type]
    return root


def hash_weights(module: Any) -> str:
    """The Merkle root of all parameters and persistent buffers; tied parameters count once."""
    leaves = {}
    persistent = set(module.state_dict().keys())
    tensors = [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if n in persistent)]
    for name, tensor in tensors:
        data = _raw(tensor.detach().contiguous())
        leaves[name] = tensor_leaf(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)
    return weights_root(leaves)


def _raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).cpu().numpy())  # type: ignore[arg-type]


def _files_key(folder: Path, dtype: torch.dtype) -> str | None:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        return None
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return digest(json.dumps([str(folder.resolve()), str(dtype), stats]).encode())


def _cache_files(folder: Path) -> list[Path]:
    base = Path(
        os.environ.get("THAW_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "thaw"
    )
    return [folder / CACHE_NAME, base / "weights" / (digest(str(folder.resolve()).encode())[3:35] + ".json")]


def _cached(folder: Path, key: str) -> str | None:
    for path in _cache_files(folder):
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        root = found.get("weights") if isinstance(found, dict) and found.get("key") == key else None
        if isinstance(root, str) and is_id(root):
            return root
    return None


def _remember(folder: Path, key: str, root: str) -> None:
    text = json.dumps({"key": key, "weights": root})
    for path in _cache_files(folder):
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text)
            temporary.replace(path)
            return
        except OSError:
            continue
