"""`thaw.attach`: from something that runs already to an engine over it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from thaw.core.errors import InvalidRequest

if TYPE_CHECKING:
    from thaw.engines.base import Engine

ASK_LIMIT_S = 5.0


def attach(
    target: Any, *, policy: str = "0", api_key: str | None = None, tokenizer: Any = None, **options: Any
) -> Engine:
    """Join what runs already; closing the engine leaves it running.

    `target` is one of
        the address of a vLLM OpenAI server that was started with thaw's file (`api_key`: that server's; default: the
            variable THAW_API_KEY, else VLLM_API_KEY or SGLANG_API_KEY)
        the address of an SGLang server that was started with `--radix-cache-backend thaw`
        an `sglang.Engine` made with `radix_cache_backend="thaw"`
        a `vllm.AsyncLLM` or `vllm.LLM` made with `thaw.engines.vllm.settings.engine_args`
        a transformers model in this process, with its `tokenizer` (`options`: as of `load_engine("transformers", …)`)

    A transformers model may be one that is being trained: thaw runs it over the same weights, copies none, and leaves
    its train or eval mode, attention, gradient checkpointing and config alone. After an optimizer step KV of the former
    weights is refused, whether the step was announced (`engine.set_policy(version)`) or not; a generation during which
    the weights changed is refused at its end.
    """
    if _is_module(target):
        from thaw.engines import load_engine

        if api_key is not None:
            raise InvalidRequest("api_key goes with the address of a server")
        return load_engine("transformers", model=target, tokenizer=tokenizer, policy=policy, **options)
    if tokenizer is not None or options:
        given = [*options, *(["tokenizer"] if tokenizer is not None else [])]
        raise InvalidRequest(f"{', '.join(given)}: only for a transformers model; a running engine has its own")
    from thaw.engines import load_engine

    if isinstance(target, str):
        return load_engine(engine_at(target, api_key), url=target, policy=policy, api_key=api_key)
    from thaw.engines import sglang, vllm

    join = sglang.attach if sglang.is_engine(target) else vllm.attach
    return join(target, policy=policy, api_key=api_key)


def engine_at(url: str, api_key: str | None = None) -> str:
    """Which engine serves this address: SGLang answers on a route of its own, every other is taken for a vLLM (whose
    client says what is wrong when it is none, or nobody is there)."""
    import urllib.error
    import urllib.request

    from thaw.engines.keys import api_key as key_for

    key = key_for("sglang", api_key)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        asked = urllib.request.Request(url.rstrip("/").removesuffix("/v1") + "/model_info", headers=headers)
        with urllib.request.urlopen(asked, timeout=ASK_LIMIT_S) as reply:
            return "sglang" if b"model_path" in reply.read(1 << 16) else "vllm"
    except (urllib.error.URLError, OSError, ValueError):
        return "vllm"


def _is_module(target: object) -> bool:
    """A torch module, found without importing torch."""
    return any(kind.__module__.startswith("torch.nn.") and kind.__name__ == "Module" for kind in type(target).__mro__)
