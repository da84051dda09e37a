"""From a way in to an engine: a client of one served engine, on a thread with an event loop of its own."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

from thaw.core.cache import CacheGroup
from thaw.core.identity import ModelIdentity
from thaw.engines.served.client.engine import ServedEngine
from thaw.engines.served.client.event_loop import LoopThread
from thaw.engines.served.client.remembered import remembered
from thaw.engines.served.client.transport import Transport

E = TypeVar("E", bound=ServedEngine)


def join(kind: type[E], start: Callable[[], Coroutine[Any, Any, Transport]], *, policy: str) -> E:
    """An engine over the transport that `start` makes. The transport is closed again where it cannot be had."""
    loop = LoopThread(kind.name)

    async def make() -> E:
        transport = await start()
        try:
            await transport.connect()
            return _engine(kind, transport, policy, loop)
        except BaseException:
            await transport.close()
            raise

    try:
        engine = loop.wait(make())
    except BaseException:
        loop.stop()
        raise
    try:
        _warn(engine._transport.facts.notes)
    except BaseException:  # where the caller has made warnings errors
        engine.close()
        raise
    return engine


def _warn(notes: Iterable[str]) -> None:
    """What the engine says of itself, said where thaw was called."""
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] == "thaw":
        depth, frame = depth + 1, frame.f_back
    for note in notes:
        warnings.warn(note, RuntimeWarning, stacklevel=depth)


def _engine(kind: type[E], transport: Transport, policy: str, loop: LoopThread) -> E:
    from thaw.engines.hf.codec import HFCodec
    from thaw.engines.hf.config import stop_set
    from thaw.engines.hf.tokenizer import load_tokenizer, transformers_tokenizer

    facts, name = transport.facts, transport.facts.model
    tokenizer = load_tokenizer(name)
    ends = stop_set(facts.eos_token_ids, tokenizer, facts.vocab_size)

    def identity(groups: tuple[CacheGroup, ...]) -> ModelIdentity:
        def say() -> ModelIdentity:
            """By torch and transformers, as every engine says it."""
            from thaw.engines.served.client.identity import model_identity

            known = HFCodec(transformers_tokenizer(name))
            return model_identity(Path(name), dtype=facts.dtype, groups=groups, codec=known, overrides=facts.overrides)

        how = {"dtype": facts.dtype, "groups": groups, "overrides": sorted(facts.overrides.items())}
        return remembered(Path(name), say, **how)

    return kind(
        transport,
        codec=HFCodec(tokenizer, ends),
        identity=identity,
        eos_token_ids=ends,
        vocab_size=facts.vocab_size,
        name=name,
        policy=policy,
        loop=loop,
    )
