"""Plain requests to an `AsyncLLM`, as any program of vLLM's own sends them: the other arm of a measurement.

No code of thaw is on their way, except the idle connector where the engine has one. `beside` uses the vLLM that a
`VllmEngine` booted, on the same event loop; `boot_stock` boots one without connector and without logits processor.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import wait
from typing import Any

import msgspec

from thaw.core.errors import EngineDied, InvalidRequest, TimedOut
from thaw.core.sampling import Sampling
from thaw.engines.base import Engine
from thaw.engines.served.sampling_extra import EXTRA, to_extra
from thaw.engines.vllm.client.async_llm import AsyncLLMTransport
from thaw.engines.vllm.client.engine import VllmEngine

FREE_LIMIT_S = 5.0
"""Blocks of requests that ended are free soon after."""


class PlainRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`salt` "": its blocks are shared with everybody. `fields` are of vLLM's SamplingParams, over greedy ones."""

    tokens: tuple[int, ...]
    max_tokens: int
    salt: str = ""
    fields: dict[str, Any] = {}


class PlainResult(msgspec.Struct, frozen=True, kw_only=True):
    """`num_cached_tokens`: what the engine counted of the prompt."""

    token_ids: tuple[int, ...]
    num_cached_tokens: int
    first_s: float


class PlainBatch(msgspec.Struct, frozen=True, kw_only=True):
    """`first_token_s`: until every request had a token; `total_s`: until all had all of theirs."""

    results: tuple[PlainResult, ...]
    first_token_s: float
    total_s: float


class Plain:
    """Requests to one vLLM, on the event loop that it lives on."""

    def __init__(self, llm: Any, loop: asyncio.AbstractEventLoop, thread: threading.Thread | None = None) -> None:
        self._llm, self._loop, self._thread = llm, loop, thread

    def run(self, requests: Sequence[PlainRequest]) -> PlainBatch:
        """Submit all at once and wait for all."""
        started = time.monotonic()
        asked = asyncio.run_coroutine_threadsafe(self._all(requests), self._loop)
        results = tuple(asked.result())
        total = time.monotonic() - started
        return PlainBatch(
            results=results, first_token_s=max(result.first_s for result in results) - started, total_s=total
        )

    def close(self) -> None:
        """End the engine, if it was booted for this. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _end(self) -> None:
        """vLLM's tasks first: they take the end of their engine for a failure."""
        llm, self._llm = self._llm, None
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.to_thread(llm.shutdown)

    async def _all(self, requests: Sequence[PlainRequest]) -> list[PlainResult]:
        return list(await asyncio.gather(*(self._one(request) for request in requests)))

    def forget_all(self) -> None:
        """Nothing is left in vLLM's prefix cache. Raises `TimedOut` where its blocks are in use all the time."""
        deadline = time.monotonic() + FREE_LIMIT_S
        while not asyncio.run_coroutine_threadsafe(self._llm.reset_prefix_cache(), self._loop).result():
            if time.monotonic() > deadline:
                raise TimedOut(f"vLLM's blocks were still in use after {FREE_LIMIT_S:g} s; end what uses them")
            time.sleep(0.01)

    async def _one(self, request: PlainRequest, arrivals: list[float] | None = None) -> PlainResult:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        fields = {"temperature": 0.0, "ignore_eos": True, "max_tokens": request.max_tokens, **request.fields}
        prompt: dict[str, Any] = {"prompt_token_ids": list(request.tokens)}
        if request.salt:
            prompt["cache_salt"] = request.salt
        params = SamplingParams(**fields, output_kind=RequestOutputKind.DELTA)
        ids: list[int] = []
        first, cached = 0.0, 0
        async for output in self._llm.generate(prompt, params, secrets.token_hex(8)):
            new = output.outputs[0].token_ids
            if new and not ids:
                first = time.monotonic()
            ids += new
            if new and arrivals is not None:
                arrivals.append(time.monotonic())
            cached = output.num_cached_tokens or cached
        return PlainResult(token_ids=tuple(ids), num_cached_tokens=cached, first_s=first)


class Decoding:
    """Requests under way. `arrivals`: of each, when its outputs came (a step's tokens are one)."""

    def __init__(self, plain: Plain, requests: Sequence[PlainRequest]) -> None:
        self.arrivals: list[list[float]] = [[] for _ in requests]
        self._futures = [
            asyncio.run_coroutine_threadsafe(plain._one(request, arrivals), plain._loop)
            for request, arrivals in zip(requests, self.arrivals, strict=True)
        ]

    def wait_for(self, count: int, *, since: float = 0.0) -> None:
        """Until each has `count` outputs that came after `since`, or has ended. Raises what one of them raised."""
        while any(
            sum(at > since for at in times[-count:]) < count and not future.done()
            for times, future in zip(self.arrivals, self._futures, strict=True)
        ):
            time.sleep(0.005)
        for future in self._futures:
            if future.done():
                future.result()

    def reached(self, count: int, *, since: float) -> float:
        """When the last of them had `count` outputs after `since`; of one that ended before, its end."""
        found = ([at for at in times if at > since][:count] for times in self.arrivals)
        return max((later[-1] for later in found if later), default=since)

    def any_over(self) -> bool:
        return any(future.done() for future in self._futures)

    def stop(self) -> None:
        """End those that go on; vLLM forgets them."""
        for future in self._futures:
            future.cancel()
        wait(self._futures)


def as_thaw_samples(sampling: Sampling, *, seed: int, output_start: int) -> dict[str, Any]:
    """`fields` that have thaw's logits processor (V1 runner) choose the tokens, as for a session of this seed."""
    return {"extra_args": {EXTRA: to_extra(sampling, seed=seed, output_start=output_start, eos_token_ids=())}}


def beside(engine: Engine) -> Plain:
    """Plain requests to the vLLM that `engine` booted. Raises `InvalidRequest` for an engine that was joined."""
    transport = engine._transport if isinstance(engine, VllmEngine) else None
    if not isinstance(transport, AsyncLLMTransport):
        raise InvalidRequest("plain requests go beside a vLLM that thaw booted in this process; load it here")
    return Plain(transport._llm, engine._loop.inner)  # type: ignore[attr-defined]


def offload_tier(nbytes: int) -> Any:
    """vLLM's own tier in host memory, for all blocks that were computed: a value of `kv_transfer_config`."""
    from vllm.config import KVTransferConfig

    extra = {"cpu_bytes_to_use": nbytes, "offload_prompt_only": False}
    return KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=extra)


def boot_stock(*, model: str, **options: Any) -> Plain:
    """A vLLM with nothing of thaw in it. `options` are vLLM's engine arguments. Raises `EngineDied`."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="plain-vllm", daemon=True)
    thread.start()

    async def start() -> Any:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, disable_log_stats=True, **options))

    try:
        llm = asyncio.run_coroutine_threadsafe(start(), loop).result()
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        loop.call_soon_threadsafe(loop.stop)
        raise EngineDied(f"vLLM did not start: {error}") from error
    return Plain(llm, loop, thread)
