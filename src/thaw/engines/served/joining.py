"""From a way in to an engine: a client of one served engine, on a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from thaw.core.errors import NotFound
from thaw.core.identity import CacheGroup, ModelIdentity
from thaw.engines.served.engine import ServedEngine
from thaw.engines.served.transport import Transport

E = TypeVar("E", bound=ServedEngine)


def join(kind: type[E], start: Callable[[], Coroutine[Any, Any, Transport]], *, policy: str) -> E:
    """An engine over the transport that `start` makes. The transport is closed again where it cannot be had."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=_serve, args=(loop,), name=f"thaw-{kind.name}", daemon=True).start()

    async def make() -> E:
        transport = await start()
        try:
            await transport.connect()
            return _engine(kind, transport, policy, loop)
        except BaseException:
            await transport.close()
            raise

    try:
        return asyncio.run_coroutine_threadsafe(make(), loop).result()
    except BaseException:
        loop.call_soon_threadsafe(loop.stop)
        raise


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _engine(kind: type[E], transport: Transport, policy: str, loop: asyncio.AbstractEventLoop) -> E:
    from transformers import AutoConfig, AutoTokenizer

    from thaw.engines.hf.codec import HFCodec
    from thaw.engines.hf.config import eos_token_ids
    from thaw.engines.served.identity import model_identity

    name = transport.facts.model
    folder = Path(name)
    try:
        codec = HFCodec(AutoTokenizer.from_pretrained(name))
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise NotFound(f"the tokenizer and config of {name} could not be loaded here: {error}") from None

    def identity(group: CacheGroup) -> ModelIdentity:
        return model_identity(folder, dtype=transport.facts.dtype, group=group, codec=codec)

    return kind(
        transport,
        codec=codec,
        identity=identity,
        eos_token_ids=tuple(eos_token_ids(folder)),
        vocab_size=config.get_text_config().vocab_size,
        name=name,
        policy=policy,
        loop=loop,
    )
