"""`thaw.attach`: from something that runs already to an engine over it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from thaw.core.errors import InvalidRequest

if TYPE_CHECKING:
    from thaw.engines.base import Engine


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
        an address or an object that the engine of another package recognises (`thaw.engines.EngineKind`)
        a transformers model in this process, with its `tokenizer` (`options`: as of `load_engine("transformers", …)`)

    A transformers model may be one that is being trained: thaw runs it over the same weights, copies none, and leaves
    its train or eval mode, attention, gradient checkpointing and config alone. After an optimizer step KV of the former
    weights is refused, whether the step was announced (`engine.set_policy(version)`) or not; a generation during which
    the weights changed is refused at its end.
    """
    from thaw.engines.registry import engine_at, kinds, load_engine

    given = {**options, **({} if tokenizer is None else {"tokenizer": tokenizer})}
    if isinstance(target, str):
        return load_engine(engine_at(target, api_key), url=target, policy=policy, api_key=api_key, **given)
    found = list(kinds())
    for kind in found:
        if kind.recognises(target):
            return kind.attach(target, policy=policy, api_key=api_key, **given)
    raise InvalidRequest(
        f"attach: a {type(target).__name__} is none of: the address of a server, an object of one of the engines here "
        f"({', '.join(sorted(kind.name for kind in found))})"
    )
