"""Loads from the arena into vLLM's blocks: how many at once, and who waits for whom. Siblings that lack the same blocks
need one load: the first asks for it, the others wait and find its blocks."""

from __future__ import annotations

from thaw.engines.served.scheduler.records import Records
from thaw.engines.vllm.scheduler.records import SchedulerRecord
from thaw.engines.vllm.scheduler.requests import RunningRequest


class Loads:
    """`async_nbytes`: a load of more bytes runs in the background, a smaller one in step."""

    def __init__(
        self, records: Records[SchedulerRecord], block_size: int, token_nbytes: int, async_nbytes: int
    ) -> None:
        self._records, self._block_size = records, block_size
        self._token_nbytes, self._async_nbytes = token_nbytes, async_nbytes
        self._leaders: dict[int, str] = {}

    def in_background(self, num_tokens: int) -> bool:
        return num_tokens * self._token_nbytes > self._async_nbytes

    def is_led(self, run: RunningRequest, want: int) -> bool:
        """Whether another request is loading what this one lacks."""
        leader = self._leaders.get(self._key(run, want))
        return leader is not None and leader != run.request.request_id

    def begins(self, run: RunningRequest, want: int) -> None:
        """It loads in the background."""
        run.loading = self._key(run, want)
        if run.loading:
            self._leaders[run.loading] = run.request.request_id

    def ends(self, run: RunningRequest) -> None:
        """Siblings may go on."""
        if run.loading:
            self._leaders.pop(run.loading, None)
            run.loading = None

    def _key(self, run: RunningRequest, want: int) -> int:
        """What siblings that load the same blocks have in common: the content of the last full one (0: none)."""
        record = self._records.get(run.message.record)
        full = want // self._block_size
        return record.chain[full - 1] if record is not None and 0 < full <= len(record.chain) else 0
