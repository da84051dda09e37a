"""In process: an offline `vllm.LLM`. Nobody steps such an engine but its caller, so a thread does while thaw has
requests in it.

While a verb of thaw's is under way the engine belongs to that thread; between verbs it is the caller's again and
`llm.generate` works as always. The two at once cannot work (each would take the other's outputs): thaw's verb is then
refused as `Busy`, and what the caller starts while a verb of thaw's runs is the caller's to avoid. A verb that has
returned has left nothing to do: its end is told only when the engine has saved what the verb computed.

Works with the engine core in a process of its own and in this one (VLLM_ENABLE_V1_MULTIPROCESSING=0).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from thaw.core.errors import Busy, EngineDied, InvalidRequest, NotFound, ThawError
from thaw.engines.served.client.transport import Chunk, Submission, Transport
from thaw.engines.vllm import versions
from thaw.engines.vllm.client.async_llm import RELOAD, chunk_of, lora_of, lora_request, mail_of, sampling_params

PAUSE_S = 0.001
News: TypeAlias = "Chunk | BaseException | None"


@dataclass
class _Request:
    submission: Submission
    tell: Callable[[News], None]


class LLMTransport(Transport):
    """The `LLM` stays when this ends."""

    always_served = False

    def __init__(self, llm: Any) -> None:
        self._llm, self._engine = llm, llm.llm_engine
        self._wake = threading.Condition()
        self._asked: deque[Callable[[], None]] = deque()
        self._requests: dict[str, _Request] = {}
        self._adapters: dict[str, str] = {}
        self._ends: list[Callable[[], None]] = []
        self._closed = False
        self._dead: ThawError | None = None
        self._thread: threading.Thread | None = None

    async def connect(self) -> None:
        self.mail = mail_of(self._engine.vllm_config)
        facts = self.mail.engine_facts()
        if facts is None:
            raise NotFound(
                "this vLLM runs without thaw's connector: make it with LLM(model, "
                "**thaw.engines.vllm.settings.engine_args(settings))"
            )
        self.facts = facts
        self._thread = threading.Thread(target=self._serve, args=(_torch_state(),), name="thaw-llm", daemon=True)
        self._thread.start()

    async def stream(self, submission: Submission) -> AsyncIterator[Chunk]:
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[News] = asyncio.Queue()
        request = _Request(submission, lambda item: _hand_over(loop, news, item))
        self._ask(lambda: self._add(request))
        ended = False
        try:
            while (item := await news.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
            ended = True
        finally:
            if not ended:
                self._ask(lambda: self._drop(submission.name))

    async def abort(self, name: str) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Queue[None] = asyncio.Queue()

        def drop() -> None:
            self._drop(name)
            self._ends.append(lambda: _hand_over(loop, done, None))

        self._ask(drop)
        await done.get()

    async def collective_rpc(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        found: concurrent.futures.Future[list[Any]] = concurrent.futures.Future()

        def call() -> None:
            try:
                found.set_result(self._engine.collective_rpc(method, None, args, kwargs))
            except Exception as error:  # noqa: BLE001 - handed to the caller
                found.set_exception(error)

        self._ask(call)
        return await asyncio.wrap_future(found)

    async def adapters(self) -> dict[str, str]:
        return dict(self._adapters)

    async def load_adapter(self, name: str, folder: str) -> None:
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def load() -> None:
            try:
                self._engine.add_lora(lora_of(folder))
                done.set_result(None)
            except Exception as error:  # noqa: BLE001 - whatever a worker raised comes as a plain Exception
                done.set_exception(InvalidRequest(f"vLLM refused adapter {name!r}: {error}"))

        self._ask(load)
        await asyncio.wrap_future(done)
        self._adapters[name] = folder

    async def reload_weights(self, folder: str) -> None:
        try:
            await self.collective_rpc(RELOAD, (), {"weights_path": folder})
        except Exception as error:  # noqa: BLE001 - whatever a worker raised comes as a plain Exception
            raise InvalidRequest(f"vLLM refused the weights of {folder}: {error}") from None
        emptied: concurrent.futures.Future[None] = concurrent.futures.Future()

        def reset() -> None:
            self._engine.reset_prefix_cache()
            emptied.set_result(None)

        self._ask(reset)
        await asyncio.wrap_future(emptied)

    async def sleep(self, level: int) -> None:
        await self._between_steps(lambda: self._engine.sleep(level))

    async def wake(self, level: int) -> None:
        """The weights first: requests of others run once all is there."""
        if level > 1:
            await self._between_steps(lambda: self._engine.wake_up(["weights"]))
            await self.reload_weights(self.facts.model)
        await self._between_steps(lambda: self._engine.wake_up(None if level == 1 else ["kv_cache"]))

    async def _between_steps(self, act: Callable[[], object]) -> None:
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def run() -> None:
            try:
                act()
                done.set_result(None)
            except Exception as error:  # noqa: BLE001 - handed to the caller
                done.set_exception(InvalidRequest(f"vLLM refused: {type(error).__name__}: {error}"))

        self._ask(run)
        await asyncio.wrap_future(done)

    async def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _ask(self, act: Callable[[], None]) -> None:
        """Have the thread do something between two steps."""
        with self._wake:
            self._asked.append(act)
            self._wake.notify()

    # -- the thread

    def _serve(self, prepare: Callable[[], None]) -> None:
        prepare()
        while self._wait():
            self._busy_time()

    def _wait(self) -> bool:
        """Until there is something to do; False when this ends."""
        with self._wake:
            self._wake.wait_for(lambda: self._asked or self._closed)
            return bool(self._asked)

    def _busy_time(self) -> None:
        """Step until none of thaw's requests is left and the engine has saved what they computed. The ends of
        requests are told when others go on, for then the steps do too, or when there is nothing left."""
        while self._asked or self._requests or self._ends:
            while self._asked:
                self._asked.popleft()()
            if not self._requests and not self._ends:
                return  # refused, or a question that needs no step: the engine may be its owner's at this moment
            try:
                stepped = self._step()
            except Exception as error:  # noqa: BLE001 - the engine is gone: whoever waits must hear of it
                self._die(EngineDied(f"vLLM's engine died: {error}"))
                return
            if self._requests or not _unfinished_work(self._engine):
                ends, self._ends = self._ends, []
                for tell in ends:
                    tell()
            if self._requests and not stepped:
                with self._wake:
                    self._wake.wait_for(lambda: self._asked, PAUSE_S)

    def _step(self) -> bool:
        """One step, unless there is nothing to wait for: a held request brings no output. True if it brought any."""
        if not _may_step(self._engine):
            return False
        outputs = self._engine.step()
        for output in outputs:
            request = self._requests.get(output.request_id)
            if request is None:
                continue
            chunk = chunk_of(output)
            if output.finished:
                self._end(request, chunk, None)
            else:
                request.tell(chunk)
        return bool(outputs)

    def _end(self, request: _Request, *last: News) -> None:
        self._requests.pop(request.submission.name, None)
        self._ends += [functools.partial(request.tell, item) for item in last]

    def _add(self, request: _Request) -> None:
        submission = request.submission
        prompt: dict[str, Any] = {"prompt_token_ids": submission.tokens}
        if submission.salt is not None:
            prompt["cache_salt"] = submission.salt
        try:
            self._check_free()
            self._engine.add_request(
                submission.name, prompt, sampling_params(submission), lora_request=lora_request(submission)
            )
        except ThawError as error:
            request.tell(error)
        except versions.refusals() as error:
            request.tell(InvalidRequest(f"vLLM refused the request: {error}"))
        except Exception as error:  # noqa: BLE001 - as above
            request.tell(EngineDied(f"vLLM's engine died: {error}"))
        else:
            self._requests[submission.name] = request

    def _check_free(self) -> None:
        if self._dead is not None:
            raise self._dead
        if self._engine.get_num_unfinished_requests() > len(self._requests):
            raise Busy("llm.generate is running in this LLM; wait for it, thaw works between two of its calls")

    def _drop(self, name: str) -> None:
        request = self._requests.get(name)
        if request is not None:
            self._engine.abort_request([name])
            self._end(request, Chunk(finish_reason="abort"), None)

    def _die(self, error: ThawError) -> None:
        self._dead = error
        self._ends += [functools.partial(request.tell, error) for request in self._requests.values()]
        self._requests.clear()
        for tell in self._ends:
            tell()
        self._ends.clear()


def _hand_over(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any], item: object) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(queue.put_nowait, item)


def _may_step(engine: Any) -> bool:
    """Whether a step returns soon. With the core in another process a step waits for its next output, which may never
    come (a request that is held back brings none): so only when one is there already."""
    waiting = getattr(engine.engine_core, "outputs_queue", None)
    return waiting is None or not waiting.empty()


def _unfinished_work(engine: Any) -> bool:
    """Whether the core must still be stepped: one in this process does nothing by itself."""
    core = getattr(engine.engine_core, "engine_core", None)
    return core is not None and bool(core.scheduler.has_requests())


def _torch_state() -> Callable[[], None]:
    """What torch keeps by thread and a core in this process relies on, to be set on the thread that steps it."""
    import torch

    threads = torch.get_num_threads()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def prepare() -> None:
        torch.set_num_threads(threads)
        if device is not None:
            torch.cuda.set_device(device)

    return prepare
