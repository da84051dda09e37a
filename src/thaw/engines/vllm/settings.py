"""The connector's options, and the arguments that load it into a stock vLLM. No vLLM and no torch here.

Options travel inside vLLM's own configuration, as `kv_connector_extra_config["thaw"]`, so every process of an engine
has the same ones. They can be given three ways, from one `VllmSettings`:

    LLM(model, **engine_args(settings))            offline, and AsyncEngineArgs
    vllm serve MODEL --config thaw.yaml            the file is `config_file(settings)`
    kv_transfer_config(settings)                   the one argument, to stand beside another connector

All of them take `others`: connectors to stand beside thaw in one of vLLM's `MultiConnector`. thaw goes first: vLLM
asks them in order, and the first one that has tokens loads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec

from thaw.core.errors import InvalidRequest
from thaw.engines.served.settings import MAX_LOGPROBS, NumBytes, ServedSettings, changed, settled

CONNECTOR = "ThawConnector"
CONNECTOR_MODULE = "thaw.engines.vllm.connector"
MULTI = "MultiConnector"
LOGITS_PROCESSOR = "thaw.engines.vllm.sampling:ThawSampling"
REFUSALS = "thaw.engines.vllm.refusals.Refusals"
KEEPS_WINDOWS = "disable_hybrid_kv_cache_manager"
"""vLLM's argument by which it keeps the KV of every token in layers with a window."""
KEY = "thaw"
STORED_FORMAT = "thaw"
"""The `load_format` that reads a model's tensors from a store (`thaw.weights.vllm_loader`)."""
KEY_VARIABLE = "VLLM_API_KEY"
"""Where the server looks for its API key."""

OTHERS_THAT_KEEP_SALT = frozenset(("OffloadingConnector", "SimpleCPUOffloadConnector"))
"""vLLM's own connectors that find KV by its salted block hashes, so that a session gets nothing but its lineage's."""

Other: TypeAlias = "str | Mapping[str, object]"
"""A connector beside thaw: its name, or a mapping as vLLM's own kv_transfer_config takes it."""


class VllmSettings(ServedSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What vLLM's connector takes besides."""

    async_nbytes: NumBytes = 64 << 20
    """A load of more than this runs beside the steps of others; a smaller one inside a step."""
    interior: bool = False
    """Of a model with windows, snapshots hold the windows of all tokens: any earlier token can be continued from, and a
    snapshot is as large as with full attention."""
    others_keep_salt: bool = False
    """What another connector of a `MultiConnector` loads for a session is found by vLLM's salted block hashes.
    Otherwise a session for which another one has loaded tokens is refused, unless it shares its prefix with all."""


def from_extra_config(extra: Mapping[str, object]) -> VllmSettings:
    """The options in a `kv_connector_extra_config`. Raises `InvalidRequest` naming the one that is wrong."""
    try:
        return msgspec.convert(extra.get(KEY) or {}, VllmSettings)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"kv_connector_extra_config[{KEY!r}]: {error}") from None


def kv_transfer_config(settings: VllmSettings, others: Sequence[Other] = ()) -> dict[str, object]:
    """What vLLM's `kv_transfer_config` takes, as plain values. Options at their default are left out.

    Raises `InvalidRequest` for one of `others` that names no connector.
    """
    beside = [_other(other) for other in others]
    if beside and all(other["kv_connector"] in OTHERS_THAT_KEEP_SALT for other in beside):
        settings = msgspec.structs.replace(settings, others_keep_salt=True)
    own: dict[str, object] = {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {KEY: changed(settings)},
    }
    if not beside:
        return own
    children = {"connectors": [own, *beside]}
    return {"kv_connector": MULTI, "kv_role": "kv_both", "kv_connector_extra_config": children}


def _other(other: Other) -> dict[str, object]:
    said = {"kv_connector": other} if isinstance(other, str) else dict(other)
    if not said.get("kv_connector") or said["kv_connector"] in (CONNECTOR, MULTI):
        raise InvalidRequest(f"beside thaw: {other!r} names no other connector; give its kv_connector")
    return {"kv_role": "kv_both", **said}


def engine_args(settings: VllmSettings, others: Sequence[Other] = ()) -> dict[str, object]:
    """Keyword arguments for `vllm.LLM` and `AsyncEngineArgs` that load the connector and the logits processor."""
    return {"kv_transfer_config": kv_transfer_config(settings, others), "logits_processors": [LOGITS_PROCESSOR]}


def server_args(settings: VllmSettings, others: Sequence[Other] = ()) -> dict[str, object]:
    """`engine_args` and what the HTTP server needs besides: its replies count cached tokens only when told to, and say
    why a request of thaw's was refused."""
    more = {"max_logprobs": MAX_LOGPROBS, "enable_prompt_tokens_details": True, "middleware": [REFUSALS]}
    return {**engine_args(settings, others), **more}


def config_file(settings: VllmSettings, others: Sequence[Other] = (), *, windows: bool = False) -> str:
    """The text of a file for the server's `--config` (its name must end with .yaml), for a model with `windows` or
    without. Settles the mail folder."""
    head = (
        "# thaw inside a stock vLLM server: vllm serve MODEL --config THIS_FILE\n"
        "# Written by `thaw engine config vllm`. What the command line says goes before what this file says.\n"
        "# Beside another connector: `thaw engine config vllm --beside NAME`.\n"
        f"# A model with sliding windows (gpt-oss, Gemma 3) also needs {KEEPS_WINDOWS.replace('_', '-')}: true\n"
    )
    wanted = {**server_args(settled(settings), others), **({KEEPS_WINDOWS: True} if windows else {})}
    arguments = {name.replace("_", "-"): value for name, value in wanted.items()}
    return head + "\n".join(_yaml(arguments)) + "\n"


def server_command(model: str, config: Path, port: int | None = None, *, python: str = "python") -> list[str]:
    """The stock server, by its module: this form also works where the console script does not (the CPU wheels)."""
    address = ["--port", str(port)] if port is not None else []
    module = "vllm.entrypoints.openai.api_server"
    return [python, "-m", module, "--model", model, "--config", str(config), *address]


YAML_WORDS = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null"))
"""Words that YAML 1.1 does not read as strings."""


def _yaml(value: object, indent: str = "") -> Iterator[str]:
    """Lines of YAML: mappings and lists as blocks, strings in quotes."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _entry(f"{indent}{_key(key)}:", inner, indent)
    elif isinstance(value, Iterable):
        for item in value:
            if isinstance(item, Mapping):
                first, *rest = _yaml(item, indent + "  ")
                yield from (f"{indent}- {first.lstrip()}", *rest)
            else:
                yield f"{indent}- {_scalar(item)}"


def _entry(head: str, inner: object, indent: str) -> Iterator[str]:
    if isinstance(inner, (Mapping, list)) and inner:
        yield head
        yield from _yaml(inner, indent + "  ")
    else:
        yield f"{head} {_scalar(inner)}"


def _key(key: str) -> str:
    plain = key.isascii() and key.replace("-", "").replace("_", "").isalpha() and key.lower() not in YAML_WORDS
    return key if plain else _scalar(key)


def _scalar(value: object) -> str:
    """As JSON writes it, but for two things that YAML 1.1 reads otherwise: surrogate pairs, and 1e-05 (a string)."""
    if isinstance(value, str):
        kept = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value)
        return f'"{"".join(kept)}"'
    if isinstance(value, float):
        mantissa, e, exponent = json.dumps(value).partition("e")
        return mantissa + (".0" if "." not in mantissa else "") + e + exponent
    return json.dumps(value)
