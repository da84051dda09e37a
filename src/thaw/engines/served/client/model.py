"""The model that the engine runs now: its limits, its policy, and its identity by files or by what is in memory."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import Callable, Sequence

import msgspec

from thaw.core.cache import CacheGroup, point_groups
from thaw.core.errors import IdentityMismatch, InvalidRequest, NotFound, TooLong
from thaw.core.identity import ModelIdentity
from thaw.core.ids import digest
from thaw.engines.base import Codec, EngineInfo
from thaw.engines.served import protocol
from thaw.engines.served.client.adapters import ClientAdapters
from thaw.engines.served.client.channel import EngineChannel
from thaw.engines.served.client.transport import Chunk, Submission
from thaw.engines.served.protocol import Answer


class ServedModel:
    """`policy`: what its owner calls these weights. `of_files`: the identity by the files, on another thread.
    `keeps_states`: it has recurrent layers, so a session can be continued from only where their states are kept."""

    def __init__(
        self,
        talk: EngineChannel,
        info: EngineInfo,
        codec: Codec,
        policy: str,
        of_files: Callable[[tuple[CacheGroup, ...]], ModelIdentity],
    ) -> None:
        self.info, self.codec, self.policy = info, codec, policy
        self._talk, self._of_files = talk, of_files
        self._found: tuple[int, ModelIdentity] | None = None
        self.adapters = ClientAdapters(talk.transport)
        self.keeps_states = bool(point_groups(info.groups))

    async def identity(self, adapter: str | None = None) -> ModelIdentity:
        """The model's identity by its files, or by a digest of what runs when that has changed since the boot.
        `adapter`: the id of the one that runs with it."""
        epoch = (await self._talk.command(protocol.Look(id=secrets.token_hex(16)))).epoch
        if self._found is None or self._found[0] != epoch:
            found = await asyncio.to_thread(self._of_files, self.info.groups)
            if epoch:
                answer = await self._talk.command(protocol.Look(id=secrets.token_hex(16), digest=True))
                weights = digest(f"{self.info.name}-device\0{answer.digest}".encode())
                found = msgspec.structs.replace(found, weights=weights)
            self._found = (epoch, found)
        return msgspec.structs.replace(self._found[1], policy=self.policy, adapter=adapter)

    async def run(self, submission: Submission, adapter: str | None, take: Callable[[Chunk], bool]) -> Answer:
        """`EngineChannel.run` under the adapter of this id, by the name that the server has for it now."""
        served = await self.adapters.of_session(adapter)
        try:
            answer = await self._talk.run(dataclasses.replace(submission, adapter=served), take)
        except NotFound:  # the server has no such name any more, and the engine has not heard of the request
            if adapter is None:
                raise
            self.adapters.forget_name(adapter)
            served = await self.adapters.of_session(adapter)
            return await self._talk.run(dataclasses.replace(submission, adapter=served), take)
        if adapter is not None and answer.kind == IdentityMismatch.kind:
            self.adapters.forget_name(adapter)
        return answer

    def check_tokens(self, num_tokens: int, tokens: Sequence[int], more: int) -> None:
        """Raise unless `tokens` may follow `num_tokens` others, with room for `more`."""
        bad = [t for t in tokens if not isinstance(t, int) or not 0 <= t < self.info.vocab_size]
        if bad:
            raise InvalidRequest(f"token ids {bad[:5]} are outside the vocabulary of {self.info.vocab_size}")
        total, limit = num_tokens + len(tokens) + more, self.info.max_model_len
        if total > limit:
            raise TooLong(
                f"{num_tokens} tokens and {len(tokens)} new ones (and {more} to generate) exceed the engine's "
                f"{limit}; shorten the prompt or fork an earlier point"
            )
