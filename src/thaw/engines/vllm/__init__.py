"""vLLM: live sessions of a stock vLLM, captured, forked and brought back through its public plug-in interfaces.

Inside the engine: a KV connector (`connector.py`: `scheduler/` in vLLM's engine process, `worker/` in every
worker) and a logits processor (`sampling.py`). Outside: `client/`, which speaks thaw's contract through plain requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from thaw.engines.base import Engine


def load(
    *,
    model: str,
    policy: str = "0",
    arena_nbytes: int | None = None,
    async_nbytes: int | None = None,
    spill: str | None = None,
    interior: bool | None = None,
    readers: int | None = None,
    beside: Sequence[str | Mapping[str, object]] = (),
    adapters: Mapping[str, str] = {},
    **options: Any,
) -> Engine:
    """Boot a vLLM of this process's own (an `AsyncLLM`, its engine core and workers in processes of their own).

    `model` is a folder or a hub id. `arena_nbytes`, `async_nbytes`, `spill`, `interior`, `readers`: see
    `settings.VllmSettings`.
    `beside`: connectors that stand beside thaw's in a `MultiConnector`, each a name or a mapping as vLLM's
    kv_transfer_config takes it. `adapters`: folders of LoRA adapters by the names that sessions call them
    (`Engine.load_adapter`); all of them may be in one step, unless max_loras says otherwise. All other options are
    vLLM's engine arguments by their own names (max_model_len, tensor_parallel_size, …).
    Raises `Unsupported` naming what thaw cannot capture, `EngineDied` when vLLM does not start.
    """
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        from thaw.core.errors import NotFound

        raise NotFound(f"the vllm engine needs {error.name}: install vLLM 0.26 to 0.32 in this environment") from None
    from thaw.engines.vllm.client.boot import boot
    from thaw.engines.vllm.settings import VllmSettings

    given = {
        "arena_nbytes": arena_nbytes, "async_nbytes": async_nbytes, "spill": spill, "interior": interior,
        "readers": readers,
    }  # fmt: skip
    settings = msgspec.structs.replace(VllmSettings(), **{k: v for k, v in given.items() if v is not None})
    if adapters:
        options = {"enable_lora": True, "max_loras": len(adapters), **options}
    engine = boot(str(model), policy=policy, settings=settings, beside=beside, **options)
    try:
        for name, folder in adapters.items():
            engine.load_adapter(name, folder)
    except BaseException:
        engine.close()
        raise
    return engine


def attach(url: Any, *, policy: str = "0", api_key: str | None = None) -> Engine:
    """Join a vLLM that runs with thaw's connector. `url`: the address of its OpenAI server, an `AsyncLLM` or an `LLM`;
    or a list of addresses (or one string of them, with commas), which are one engine then: sessions are spread over
    them, as over the ranks of a data-parallel server.

    It goes on when this engine is closed. `api_key` goes with an address (default: THAW_API_KEY, else VLLM_API_KEY,
    which the server reads too). Raises `NotFound` when nobody is there, or nobody with thaw's connector.
    """
    from thaw.engines.vllm.client.boot import attach as join

    engine = join(url, policy=policy, api_key=api_key)
    if isinstance(url, (str, list, tuple)):  # a repository remembers that it was joined, and never the key
        engine.options = {"url": url if isinstance(url, str) else ",".join(url)}
    return engine
