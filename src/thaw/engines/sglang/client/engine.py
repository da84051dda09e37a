"""Where SGLang's API differs from other servers': its sampling parameters, and where its count of cached tokens is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from thaw.core.errors import Busy, InvalidRequest
from thaw.engines.served.client.dialect import Dialect
from thaw.engines.served.client.engine import ServedEngine
from thaw.engines.served.client.transport import Chunk
from thaw.engines.served.protocol import EngineFacts
from thaw.engines.served.sampling_extra import EXTRA, needed, to_extra
from thaw.engines.session.turns import OpenTurn

RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"


class SglangDialect(Dialect):
    one_token: ClassVar[dict[str, Any]] = {"temperature": 0.0, "max_new_tokens": 1, "ignore_eos": True}

    def fields(self, turn: OpenTurn, num_tokens: int) -> dict[str, Any]:
        """All that is not plain greedy goes through thaw's own sampling inside SGLang, by (seed, position)."""
        s, done, eos = turn.sampling, len(turn.logprobs), self.info.eos_token_ids
        stops = {*s.stop_token_ids, *(() if s.ignore_eos else eos)}
        too_soon = {*self.facts.more_ends, *self._end_of_message()} - set(eos)
        fields: dict[str, Any] = {
            "temperature": 0.0,
            "max_new_tokens": max(1, min(s.max_tokens - done, self.info.max_model_len - num_tokens)),
            "logprobs": s.logprobs or 0,
            "ignore_eos": s.ignore_eos or bool(too_soon),
            "stop_token_ids": sorted(stops),
        }
        if needed(s):
            fields[EXTRA] = to_extra(
                s, seed=turn.seed, output_start=turn.start, eos_token_ids=eos, bad_ids=turn.bad_ids
            )
        return fields

    def _end_of_message(self) -> list[int]:
        """Llama's `<|eom_id|>`, at which SGLang ends a request whatever the model's files say."""
        found = self.codec.encode("<|eom_id|>", first=False)
        return found if len(found) == 1 else []

    def num_cached(self, chunk: Chunk) -> int | None:
        """SGLang says it with its tokens."""
        return chunk.more.get("num_cached_tokens")


class SglangEngine(ServedEngine):
    """One SGLang (tensor-parallel ranks included). Sessions live until `close_session` or `close`."""

    name = "sglang"
    dialect = SglangDialect

    @classmethod
    def no_sleep(cls, facts: EngineFacts, level: int) -> str:
        if facts.sleep_levels:
            return (
                "this SGLang keeps no copy of its weights while it sleeps: start it with --enable-weights-cpu-backup, "
                "or sleep with level 2, after which they are read again"
            )
        return "this SGLang was started without its memory saver; start it with --enable-memory-saver"

    async def _put_to_sleep(self, level: int) -> None:
        """The tree is emptied first, while the memory of its nodes is there. SGLang ends as a whole when it is asked to
        release memory while a request runs, and refuses to empty the tree then, which is why it is asked that first."""
        try:
            await self._transport.post("/flush_cache", {})
        except InvalidRequest as error:
            raise Busy(f"SGLang works for others, and would end if it released its memory now: {error}") from None
        await self._transport.post(RELEASE, {})

    async def _bring_back(self, level: int) -> None:
        """The weights first: requests of others run once all is there."""
        if level > 1:
            await self._transport.post(RESUME, {"tags": ["weights"]})
            await self._transport.post("/update_weights_from_disk", {"model_path": self._transport.facts.model})
        await self._transport.post(RESUME, {} if level == 1 else {"tags": ["kv_cache", "cuda_graph"]})

    def update_weights(self, source: str | Path) -> None:
        """SGLang loads the weights of the folder in place and empties its cache; `InvalidRequest` when it refuses."""
        from thaw.engines.hf.checkpoint import require_weights_of

        self._require_awake()
        require_weights_of(self.info.model, source)  # SGLang leaves a tensor that the files lack as it was
        self._loop.wait(self._transport.post("/update_weights_from_disk", {"model_path": str(source)}))

    def flush_cache(self) -> None:
        """SGLang's own reset of its cache; sessions are in thaw's arena and stay. Raises `InvalidRequest` while
        requests run, as SGLang refuses it then."""
        self._require_awake()
        self._loop.wait(self._transport.post("/flush_cache", {}))
