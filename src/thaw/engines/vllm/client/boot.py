"""From a model's name, or an engine that runs already, to a `VllmEngine`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

from thaw.core.errors import EngineDied, InvalidRequest, ThawError, Unsupported
from thaw.engines.base import Engine
from thaw.engines.hf.config import check_length, load_config, num_positions, windows
from thaw.engines.keys import api_key as key_for
from thaw.engines.served.client.attach import join
from thaw.engines.served.client.engine import MAX_TOP_LOGPROBS
from thaw.engines.served.client.transport import Transport
from thaw.engines.served.settings import settled
from thaw.engines.vllm import support, versions, vision
from thaw.engines.vllm.client.engine import VllmEngine
from thaw.engines.vllm.client.fleet import DataParallelEngine
from thaw.engines.vllm.client.http import VllmHttpTransport
from thaw.engines.vllm.settings import KEEPS_WINDOWS, KEY_VARIABLE, Other, VllmSettings, engine_args


def boot(
    model: str, *, policy: str, settings: VllmSettings, beside: Sequence[Other] = (), **options: Any
) -> VllmEngine:
    """Start an engine of this client's own. `options` are vLLM's engine arguments. Raises `Unsupported` for those that
    thaw cannot work with, `IncompleteModel` for files that are not their config's, `NotFound` where a module is missing
    that the model needs, before anything starts."""
    vision.require(model)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from thaw.engines.hf.checkpoint import local_folder, require_files, require_whole
    from thaw.engines.vllm.client.async_llm import AsyncLLMTransport

    own = engine_args(settled(settings), beside)
    clash = sorted(own.keys() & options.keys())
    if clash:
        raise InvalidRequest(f"{', '.join(clash)}: set by thaw itself; give thaw's own options instead")
    arguments = {"max_logprobs": MAX_TOP_LOGPROBS, "disable_log_stats": True, **options, **own}
    folder = local_folder(model)
    if folder is not None:
        require_files(folder)  # vLLM reads them in its own way before it says what config it runs
    arguments |= _length(model, options) | _windows(model, options)

    async def start() -> Transport:
        try:
            if versions.processor_costs_v2({"model": model, **arguments, "logits_processors": None}):
                arguments["logits_processors"] = None
            config = AsyncEngineArgs(model=model, **arguments).create_engine_config()
            support.require_one_rank(config.parallel_config)
            support.require_config(config)
            require_whole(config.model_config.model, support.overrides(config.model_config))
            llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, **arguments))
        except ThawError:
            raise
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            raise EngineDied(f"vLLM did not start: {error}") from error
        return AsyncLLMTransport(llm, owned=True)

    return join(VllmEngine, start, policy=policy)


def _length(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What makes vLLM take a `max_model_len` that a stretched rope has positions for: it goes by the config's number.
    Raises `InvalidRequest` for a longer one, as every engine of thaw's does."""
    wanted, overrides = options.get("max_model_len"), options.get("hf_overrides") or {}
    if wanted in (None, support.FITTED) or not isinstance(overrides, Mapping):
        return {}
    try:
        config = load_config(model, overrides).get_text_config().to_dict()
    except (OSError, ValueError, Unsupported):  # vLLM says what is wrong with it
        return {}
    check_length(config, wanted)
    limit = num_positions(config)
    return {"hf_overrides": {**overrides, support.ALLOWED: limit}} if limit is not None else {}


def _windows(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What makes vLLM keep the KV that has left a window. An owner's own word goes before it."""
    overrides = options.get("hf_overrides") or {}
    if KEEPS_WINDOWS in options or not isinstance(overrides, Mapping):
        return {}
    try:
        config = load_config(model, overrides).get_text_config().to_dict()
    except (OSError, ValueError, ThawError):  # vLLM, or what looks at its config, says what is wrong with it
        return {}
    return {KEEPS_WINDOWS: True} if windows(config) else {}


def attach(target: Any, *, policy: str, api_key: str | None = None) -> Engine:
    """Join a vLLM that runs already: the address of its server, an `AsyncLLM` or an `LLM`. It stays when this ends.

    Several addresses, in a list or with commas between them, and the ranks of a data-parallel server are one engine.

    An `AsyncLLM` is used on the event loop that it runs on: the one where it served its first request, else the one
    that this is called from, else thaw's own. Wait for thaw on another thread than that loop's (`thaw.aio` does).
    """
    if isinstance(target, str):
        target = [part for part in target.split(",") if part]
    if not isinstance(target, (list, tuple)):
        return join(VllmEngine, _way_in(target, api_key), policy=policy)
    if not target or not all(isinstance(url, str) for url in target):
        raise InvalidRequest(f"attach: {target!r} is no list of addresses; of a program's own engines attach to each")
    members: list[VllmEngine] = []
    try:
        for url in target:
            members += _ranks(url, api_key, policy)
        return members[0] if len(members) == 1 else DataParallelEngine(members)
    except BaseException:
        for member in members:
            member.close()
        raise


def _ranks(url: str, api_key: str | None, policy: str) -> Iterator[VllmEngine]:
    """The server's engine, or those of all its data-parallel ranks."""
    first = VllmHttpTransport(url, key_for(KEY_VARIABLE, api_key))
    yield _named(join(VllmEngine, _given(first), policy=policy), first)
    for rank in first.other_ranks:
        other = VllmHttpTransport(url, key_for(KEY_VARIABLE, api_key), rank=rank)
        yield _named(join(VllmEngine, _given(other), policy=policy), other)


def _named(engine: VllmEngine, transport: VllmHttpTransport) -> VllmEngine:
    engine.options = {"url": transport.url}
    return engine


def _given(transport: Transport) -> Callable[[], Coroutine[Any, Any, Transport]]:
    async def start() -> Transport:
        return transport

    return start


def _way_in(target: Any, api_key: str | None) -> Callable[[], Coroutine[Any, Any, Transport]]:
    """What makes the transport for an engine of this program, on the client's loop."""
    if api_key is not None:
        raise InvalidRequest("api_key goes with the address of a server")
    return _given(_in_this_process(target))


def _in_this_process(target: Any) -> Transport:
    try:
        from vllm import LLM
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError:
        raise InvalidRequest(
            f"attach: a {type(target).__name__} is not the address of a vLLM server, and vLLM is not installed here"
        ) from None

    if isinstance(target, LLM):
        from thaw.engines.vllm.client.llm import LLMTransport

        return LLMTransport(target)
    if isinstance(target, AsyncLLM):
        from thaw.engines.served.client.foreign_loop import ForeignLoopTransport
        from thaw.engines.vllm.client.async_llm import AsyncLLMTransport, home_of

        inner = AsyncLLMTransport(target, owned=False)
        home = home_of(target)
        return inner if home is None else ForeignLoopTransport(inner, home)
    raise InvalidRequest(
        f"attach: a {type(target).__name__} is none of: the address of a vLLM server, an AsyncLLM, an LLM"
    )
