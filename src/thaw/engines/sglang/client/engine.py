"""Where SGLang's API differs from other servers': its sampling parameters, and where its count of cached tokens is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from thaw.engines.served.client.dialect import Dialect
from thaw.engines.served.client.engine import ServedEngine
from thaw.engines.served.client.transport import Chunk
from thaw.engines.served.sampling_extra import EXTRA, needed, to_extra
from thaw.engines.session.turns import OpenTurn


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

    def update_weights(self, source: str | Path) -> None:
        """SGLang loads the weights of the folder in place and empties its cache; `InvalidRequest` when it refuses."""
        from thaw.engines.hf.checkpoint import require_weights_of

        require_weights_of(self.info.model, source)  # SGLang leaves a tensor that the files lack as it was
        self._loop.wait(self._transport.post("/update_weights_from_disk", {"model_path": str(source)}))

    def flush_cache(self) -> None:
        """SGLang's own reset of its cache; sessions are in thaw's arena and stay. Raises `InvalidRequest` while
        requests run, as SGLang refuses it then."""
        self._loop.wait(self._transport.post("/flush_cache", {}))
