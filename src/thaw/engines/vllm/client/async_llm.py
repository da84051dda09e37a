"""In process: an `AsyncLLM`, booted here or handed in. Its engine core and workers are processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from thaw.core.errors import EngineDied, InvalidRequest, NotFound
from thaw.engines.served import protocol
from thaw.engines.served.client.transport import Chunk, LogprobsOfToken, Submission, Transport
from thaw.engines.served.mailbox import Mailbox, default_folder
from thaw.engines.vllm import support, versions
from thaw.engines.vllm.settings import from_extra_config

NUMBER_DIGITS = 12
"""Hex digits of an adapter's id that its number in vLLM is made of."""
RELOAD = "reload_weights"
"""The method of vLLM's workers that loads weights in place."""


class AsyncLLMTransport(Transport):
    """`owned`: the engine was booted for this client and ends with it."""

    def __init__(self, llm: Any, *, owned: bool) -> None:
        self._llm, self._owned, self.stays = llm, owned, not owned
        self._adapters: dict[str, str] = {}

    async def connect(self) -> None:
        self.mail = mail_of(self._llm.vllm_config)
        facts = self.mail.engine_facts()
        if facts is None:
            raise NotFound(
                "this vLLM runs without thaw's connector: start it with the arguments of "
                "thaw.engines.vllm.settings.engine_args (thaw engine config vllm writes them as a file)"
            )
        self.facts = facts

    async def stream(self, submission: Submission) -> AsyncIterator[Chunk]:
        from vllm.v1.engine.exceptions import EngineDeadError

        prompt: dict[str, Any] = {"prompt_token_ids": submission.tokens}
        if submission.salt is not None:
            prompt["cache_salt"] = submission.salt
        try:
            asked = self._llm.generate(
                prompt, sampling_params(submission), submission.name, lora_request=lora_request(submission)
            )
            async for output in asked:
                yield chunk_of(output)
        except EngineDeadError as error:
            raise EngineDied(f"vLLM's engine died: {error}") from None
        except versions.refusals() as error:
            raise InvalidRequest(f"vLLM refused the request: {error}") from None

    async def abort(self, name: str) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        with contextlib.suppress(EngineDeadError):
            await self._llm.abort(name)

    async def collective_rpc(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            found: list[Any] = await self._llm.collective_rpc(method, args=args, kwargs=kwargs)
        except EngineDeadError as error:
            raise EngineDied(f"vLLM's engine died: {error}") from None
        return found

    async def reload_weights(self, folder: str) -> None:
        try:
            await self.collective_rpc(RELOAD, (), {"weights_path": folder})
        except EngineDied:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a worker raised comes as a plain Exception
            raise InvalidRequest(f"vLLM refused the weights of {folder}: {error}") from None
        await self._llm.reset_prefix_cache()

    async def sleep(self, level: int) -> None:
        await self._llm.sleep(level)

    async def wake(self, level: int) -> None:
        """The weights first: requests of others run once all is there."""
        if level > 1:
            await self._llm.wake_up(["weights"])
            await self.reload_weights(self.facts.model)
        await self._llm.wake_up(None if level == 1 else ["kv_cache"])

    async def adapters(self) -> dict[str, str]:
        return dict(self._adapters)

    async def load_adapter(self, name: str, folder: str) -> None:
        try:
            await self._llm.add_lora(lora_of(folder))
        except Exception as error:  # noqa: BLE001 - whatever a worker raised comes as a plain Exception
            raise InvalidRequest(f"vLLM refused adapter {name!r}: {error}") from None
        self._adapters[name] = folder

    async def stalled(self) -> str:
        """Why jobs of the connector's have to wait: one that is paused does them, unless it may be asleep."""
        if not self._llm.vllm_config.model_config.enable_sleep_mode or not await self._llm.is_paused():
            return ""
        return (
            "its owner has paused this vLLM or put it to sleep, and one that was started with enable_sleep_mode does "
            "nothing meanwhile; resume it, or wake it up"
        )

    async def close(self) -> None:
        if self._owned:
            await asyncio.to_thread(self._llm.shutdown)
            self._llm = None  # vLLM's destructor complains when it first runs at the interpreter's end
            gc.collect()
            if hasattr(self, "mail"):
                self.mail.remove()


def sampling_params(submission: Submission) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    fields = dict(submission.sampling)
    if "structured_outputs" in fields:
        fields["structured_outputs"] = StructuredOutputsParams(**fields["structured_outputs"])
    extra = {**fields.pop("extra_args", {}), "kv_transfer_params": protocol.params(submission.message)}
    return SamplingParams(**fields, extra_args=extra, output_kind=RequestOutputKind.DELTA, detokenize=False)


def lora_request(submission: Submission) -> Any:
    return None if submission.adapter is None else lora_of(submission.adapter.folder)


def lora_of(folder: str) -> Any:
    """vLLM's `LoRARequest` of a folder that is called by its content: so are its name and its number."""
    from vllm.lora.request import LoRARequest

    content = Path(folder).name
    return LoRARequest(f"thaw-{content}", 1 + int(content[:NUMBER_DIGITS], 16), folder)


def chunk_of(output: Any) -> Chunk:
    """vLLM's `RequestOutput` (of kind DELTA)."""
    one = output.outputs[0]
    ids = tuple(one.token_ids)
    tops = tuple(_tops(step) for step in (one.logprobs or ()))
    logprobs = tuple(_own(step, token) for step, token in zip(one.logprobs or (), ids, strict=False))
    return Chunk(ids, logprobs, tops, one.finish_reason if output.finished else None)


def _tops(step: Any) -> LogprobsOfToken:
    return tuple((int(token), float(entry.logprob)) for token, entry in step.items())


def _own(step: Any, token: int) -> float:
    return float(step[token].logprob)


def mail_of(vllm_config: Any) -> Mailbox:
    """The engine's mail, by its own configuration. Raises `NotFound` without thaw's connector."""
    base = mail_folder(vllm_config)
    support.require_one_rank(vllm_config.parallel_config)
    return Mailbox(base)


def mail_folder(vllm_config: Any) -> Path:
    """Where the engine's mail is, or those of its data-parallel ranks. Raises `NotFound` without thaw's connector."""
    transfer = vllm_config.kv_transfer_config
    extra = _thaw_extra(transfer) if transfer is not None else None
    if extra is None:
        raise NotFound("this vLLM was started without thaw's connector (thaw engine config vllm writes what it needs)")
    settings = from_extra_config(extra)
    return Path(settings.mail) if settings.mail else default_folder(vllm_config.instance_id)


def _thaw_extra(transfer: Any) -> dict[str, Any] | None:
    if transfer.kv_connector == "ThawConnector":
        return dict(transfer.kv_connector_extra_config)
    for child in transfer.kv_connector_extra_config.get("connectors", ()):
        if child.get("kv_connector") == "ThawConnector":
            return dict(child.get("kv_connector_extra_config") or {})
    return None


def home_of(async_llm: Any) -> asyncio.AbstractEventLoop | None:
    """The loop that an `AsyncLLM` belongs to, or will if nothing is done; None when there is none."""
    handler: asyncio.Task[Any] | None = async_llm.output_handler
    if handler is not None:
        return handler.get_loop()
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
