"""A model from its config.json alone: supported or not and why, and how large its sessions are. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from thaw.core.cache import nbytes_at, point_groups
from thaw.core.errors import IncompleteModel, InvalidRequest, NotFound, ThawError
from thaw.core.findings import Finding
from thaw.doctor.report import ModelReport
from thaw.engines.hf.beside import POINTER, Config, is_pointer, may_not_read, parse_object, require_beside
from thaw.engines.hf.config import resolved, sensible
from thaw.engines.hf.groups import text_config
from thaw.engines.transformers import support

SESSION_TOKENS = 4096
MAX_CONFIG_BYTES = 8 << 20
MAX_TOKEN_NBYTES = 1 << 32
UNGATED = ("gpt_neox", "gpt2", "opt", "bloom", "falcon", "phi")
"""Model types whose feed-forward layers have two matrices, not three."""


def read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """(name, config) of a config.json or of a model's folder. Raises `NotFound`, `InvalidRequest`, `StorageFailed`."""
    file = path
    try:
        file = path / "config.json" if path.is_dir() else path
        with file.open("rb") as opened:
            data = opened.read(MAX_CONFIG_BYTES + 1)
    except PermissionError as error:
        raise may_not_read(file, error) from None
    except (OSError, ValueError):
        raise NotFound(f"there is no config {str(path)[:200]}; give a model's folder or its config.json") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise InvalidRequest(f"{file} has more than {MAX_CONFIG_BYTES} bytes; a model's config.json is smaller")
    if is_pointer(data):
        raise InvalidRequest(POINTER.format(file))
    try:
        config = parse_object(data.decode("utf-8"), file, Config)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{file} is not text in UTF-8: {error}") from None
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    return (path if path.is_dir() else path.absolute().parent).name, config


def report(name: str, config: Mapping[str, Any], dtype: str | None = None) -> ModelReport:
    """What the config says, completed as a boot does. Raises `InvalidRequest` where it makes no sense."""
    with sensible(repr(name)):
        config = resolved(config)
        found = support.examine(config, dtype)
        parameters, work = _work(config, found)
    per_token = found.kv_token_nbytes
    states = point_groups(found.groups)
    if per_token is not None and not (0 < per_token < MAX_TOKEN_NBYTES or (per_token == 0 and states)):
        raise InvalidRequest(f"the config of {name!r} makes no sense: it gives {per_token} bytes of KV per token")
    return ModelReport(
        name=name,
        architecture=found.architecture,
        supported=found.supported,
        tested=found.tested,
        reasons=found.reasons,
        dtype=found.dtype,
        num_layers=found.num_layers,
        num_kv_heads=found.num_kv_heads,
        head_dim=found.head_dim,
        max_model_len=found.max_model_len,
        num_parameters=parameters,
        prefill_flops=work,
        kv_token_nbytes=per_token,
        session_tokens=SESSION_TOKENS,
        session_nbytes=nbytes_at(found.groups, SESSION_TOKENS) if found.groups else None,
        state_nbytes=sum(group.nbytes for group in states) or None,
        cache_groups=tuple(map(str, found.groups)),
    )


def finding(model: ModelReport) -> Finding:
    """The verdict in a line."""
    if not model.supported:
        return Finding(
            name="model",
            status="problem",
            text=f"{model.name} ({model.architecture}) is not supported: {'; '.join(model.reasons)}",
            advice="docs/engines.md says which models thaw runs, and in which engines.",
        )
    tested = (
        "tested" if model.tested else "not in thaw's own tests; the engine compares it with the stock model at boot"
    )
    return Finding(
        name="model",
        status="ok" if model.tested else "info",
        text=f"{model.name} ({model.architecture}) is supported, {tested}",
    )


def files(folder: Path, model: ModelReport) -> Iterator[Finding]:
    """Whether a boot takes the files of the model in `folder`. Their headers are read, and no weights."""
    try:
        paths = _look_at(folder, model.supported)
    except ThawError as error:
        yield Finding(name="model-files", status="problem", text=str(error))
        return
    if paths is None:
        text = f"{model.name}: without torch and transformers, only the files next to its weights were checked"
        yield Finding(name="model-files", status="info", text=text)
    elif not paths:
        advice = "No engine can boot it without them."
        yield Finding(name="model-files", status="warning", text=f"there are no weights in {folder}", advice=advice)
    else:
        yield Finding(
            name="model-files", status="ok", text=f"{model.name}: its files are complete and match its config"
        )
        yield from _in_servers(folder)


def _look_at(folder: Path, supported: bool) -> list[Path] | None:
    """The weight files; None where there is nothing here to look into them with."""
    require_beside(folder)
    try:
        from thaw.engines.hf.checkpoint import require_files, require_fit
    except ImportError:
        return None
    return require_fit(folder) if supported else require_files(folder)


def _in_servers(folder: Path) -> Iterator[Finding]:
    from thaw.engines.hf.checkpoint import require_whole

    try:
        require_whole(folder)
    except IncompleteModel as error:
        yield Finding(name="model-files", status="warning", text=f"vLLM and SGLang refuse it: {error}")


def _work(whole: Mapping[str, Any], shape: support.Support) -> tuple[int | None, float | None]:
    """(parameters, operations to prefill a session) of a decoder of the common shape; biases and norms are left out."""
    config = text_config(whole)
    hidden = config.get("hidden_size") or config.get("n_embd")
    heads = config.get("num_attention_heads") or config.get("n_head")
    known = (hidden, heads, config.get("vocab_size"), shape.num_layers, shape.num_kv_heads, shape.head_dim)
    if not all(isinstance(x, int) and x > 0 for x in known):
        return None, None
    hidden, heads, vocab, layers, kv_heads, dim = (int(x) for x in known if x is not None)
    inner = config.get("intermediate_size") or 4 * hidden
    if not isinstance(inner, int):  # it differs from layer to layer
        return None, None
    gated = str(config.get("model_type")) not in UNGATED
    per_layer = hidden * dim * (2 * heads + 2 * kv_heads) + (3 if gated else 2) * hidden * inner
    parameters = layers * per_layer + vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    matrices = 2.0 * layers * per_layer * SESSION_TOKENS
    attention = 2.0 * layers * heads * dim * SESSION_TOKENS**2
    return int(parameters), matrices + attention
