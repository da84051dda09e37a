"""SGLang: live sessions of a stock SGLang, captured, forked and brought back through its public plug-in interfaces.

Inside the engine: seven hooks (`hooks.py`), found by SGLang's entry point (`plugin.py`), and in `scheduler/` a radix
cache over records of sessions, whose ranks decide alike (`rank_consensus.py`). Outside: `client/`, which speaks thaw's
contract through plain requests.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import msgspec

from thaw.core.errors import InvalidRequest, NotFound
from thaw.engines.base import Engine


def load(
    *,
    model: str,
    policy: str = "0",
    arena_nbytes: int | None = None,
    spill: str | None = None,
    interior: bool | None = None,
    readers: int | None = None,
    **options: Any,
) -> Engine:
    """Boot an SGLang of this process's own, in processes of its own that end with it.

    `model` is a folder or a hub id. `arena_nbytes`, `spill`, `interior`, `readers`: see `settings.SglangSettings`. All
    other options are SGLang's own arguments (page_size, tp_size, max_total_tokens, …); `max_model_len` and
    `tensor_parallel_size` mean what they mean in other engines. Raises `EngineDied` when SGLang does not start, with
    what its log says.
    """
    from thaw.engines.sglang.client.boot import boot
    from thaw.engines.sglang.settings import SglangSettings

    found = importlib.util.find_spec("sglang")
    if found is None or found.origin is None:
        raise NotFound("the sglang engine needs SGLang 0.5.23 in this environment (make .venv-sglang, on a CPU)")
    given = {"arena_nbytes": arena_nbytes, "spill": spill, "interior": interior, "readers": readers}
    settings = msgspec.structs.replace(SglangSettings(), **{k: v for k, v in given.items() if v is not None})
    return boot(str(model), policy=policy, settings=settings, **options)


def attach(target: Any, *, policy: str = "0", api_key: str | None = None) -> Engine:
    """Join an SGLang that runs with thaw's cache (`--radix-cache-backend thaw`): a server, by its address, or an
    `sglang.Engine` of this program (`Engine(radix_cache_backend="thaw", …)`).

    It goes on when this engine is closed. `api_key`: the server's (default: THAW_API_KEY, else SGLANG_API_KEY). Raises
    `NotFound` when nobody is there, or nobody with thaw's cache.

    An `Engine` is used on the event loop that it runs on. `engine.generate` works between two verbs of thaw's; in an
    `async` program wait for thaw on another thread than that loop's (`thaw.aio` does).
    """
    if not isinstance(target, str) and not is_engine(target):
        raise InvalidRequest(
            f"attach: a {type(target).__name__} is no address of an SGLang server and no sglang.Engine"
        )
    from thaw.engines.sglang.client.boot import attach as join

    engine = join(target, policy=policy, api_key=api_key)
    if isinstance(target, str):  # a repository remembers that it was joined, and never the key
        engine.options = {"url": target}
    return engine


def is_engine(target: object) -> bool:
    """Whether it is an `sglang.Engine`, found without importing SGLang."""
    return any(k.__module__ == "sglang.srt.entrypoints.engine" and k.__name__ == "Engine" for k in type(target).__mro__)
