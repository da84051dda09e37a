"""What a request has computed goes into its record: when somebody asks for it, when vLLM takes its blocks away, and
when it ends. Here it is decided and put into jobs; the workers copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from thaw.core.errors import Busy, ThawError
from thaw.engines.served.scheduler.records import Records
from thaw.engines.vllm import jobs
from thaw.engines.vllm.block_tables import BlockTables
from thaw.engines.vllm.jobs import Job
from thaw.engines.vllm.scheduler.content_ids import BlockContents
from thaw.engines.vllm.scheduler.records import SchedulerRecord
from thaw.engines.vllm.scheduler.requests import RunningRequest, is_failed


class Saves:
    """`tables`: the blocks of every request of thaw's that has some, by its name, a list for each of vLLM's KV cache
    groups. `groups`: which of these keep tokens, and which states. `refuse` ends a command. `rescues`: jobs that must
    be done before anything is written over what vLLM has taken away; they come first in the next step.

    After a step that ends at n tokens the state after n tokens lies in the request's blocks until its next step. So a
    state is copied when somebody needs it: at the request's end, and where it is captured while it runs."""

    def __init__(
        self,
        records: Records[SchedulerRecord],
        contents: BlockContents,
        queue: list[Job],
        block_size: int,
        groups: BlockTables,
        refuse: Callable[[str, ThawError], None],
    ) -> None:
        self._records, self._contents, self._queue, self._block_size = records, contents, queue, block_size
        self._groups, self._refuse = groups, refuse
        self.tables: dict[str, list[list[int]]] = {}
        self.rescues: list[Job] = []
        self.num_preempted = 0

    def catch_up(self, name: str, record: SchedulerRecord, want: int | None) -> int:
        """How many tokens the record `name` has; of one that is running, those computed by now are synced first."""
        live = record.live
        if live is None or (want is not None and want <= record.num_kv):
            return record.num_kv
        table = self.tables.get(live.request_id)
        # Some of these are still being computed, in steps that vLLM has put together already. The job runs behind them.
        ready: int = min(live.num_computed_tokens, live.num_tokens - 1)
        if want is not None:
            ready = min(ready, want)
        if self._groups.states and ready != live.num_computed_tokens:
            return record.num_kv
        if table is None or ready <= record.num_kv:
            return record.num_kv
        self._queue.append(self._sync(record, name, table, ready, live))
        record.leaving = True
        return ready

    def rescue(self, run: RunningRequest) -> None:
        """If vLLM has preempted the request: save its KV before anything is written over it, in the jobs of the very
        next step. It then continues from the record with the same bits, instead of computing what it had again."""
        request = run.request
        if request.num_preemptions == run.preempted:
            return
        run.preempted, run.background = request.num_preemptions, False
        self.num_preempted += 1
        table = self.tables.pop(request.request_id, None)
        record = self._records.get(run.message.record)
        if self._groups.states:
            self._goes_back(run, record)
            return
        if table is None or record is None or record.live is not request:
            return
        upto = min(run.computed, request.num_tokens - 1, self._room(self._groups.of_tokens(table)))
        if upto > record.num_kv or record.leaving:
            upto = max(upto, record.num_kv)
            self.rescues.append(self._sync(record, run.message.record, table, upto, request, now=True))
            record.leaving = False
        run.want = record.num_kv

    def _goes_back(self, run: RunningRequest, record: SchedulerRecord | None) -> None:
        """A preempted request of a model that keeps states: vLLM has given its blocks away before anything of it could
        be saved, so it begins again where it began, and computes what came after anew."""
        name = run.message.record
        if record is None or record.live is not run.request:
            return
        late = [job for job in self._queue if isinstance(job, jobs.WriteRecord) and _is_past(job, name, run.want)]
        self._queue[:] = [
            job
            for job in self._queue
            if job not in late and not (isinstance(job, jobs.SaveBlocks) and job.record == name)
        ]
        for job in late:
            self._refuse(job.name, Busy("vLLM took the session's blocks away in this step; capture it again"))
        record.num_kv, record.tokens = run.want, record.tokens[: run.want]
        del record.chain[run.want // self._block_size :]
        record.points, record.recent = {point for point in record.points if point <= run.want}, []
        record.leaving = False
        self._queue.append(jobs.ForkRecord(name, name, run.want, record.caller))

    def end(self, run: RunningRequest, tables: Sequence[Sequence[int]]) -> tuple[bool, int]:
        """The request is over: (whether its blocks must be held until the workers have copied them, how many tokens
        its record has then)."""
        request, name = run.request, run.message.record
        record = self._records.get(name)
        if record is None or record.live is not request:
            return False, 0
        held = False
        of_tokens = self._groups.of_tokens(tables) if tables else ()
        num_kv = self._end_of(request)
        keep = run.message.keep and run.error is None and not is_failed(request)
        keep = keep and self._has_state(record, request, num_kv)
        over = not run.message.ends_early
        if keep and num_kv > record.num_kv and self._room(of_tokens) >= num_kv:
            self._queue.append(self._sync(record, name, tables, num_kv, request, request.request_id, over=over))
            held = True
        elif record.leaving and any(of_tokens):
            self._queue.append(jobs.SaveBlocks(name, (), 0, request.request_id, over=over))
            held = True
        # Nor is the state that such a step leaves: its tokens have no KV in the record.
        record.recent = [] if held and over else [point for point in record.recent if point <= record.num_kv]
        record.points = {point for point in record.points if point <= record.num_kv}
        record.live, record.leaving = None, False
        self._records.touch(name)
        return held, record.num_kv

    def _end_of(self, request: Any) -> int:
        """How many tokens an ended request has. A step may be under way that was put together before the last token was
        known: what it computes is nobody's. But a state lies where that step leaves it, as long as its tokens are
        known: those of a prompt."""
        computed, last = request.num_computed_tokens, request.num_tokens - 1
        if self._groups.states and computed <= last:
            return int(computed)
        return int(max(0, min(computed - request.num_in_flight_tokens, last)))

    def _has_state(self, record: SchedulerRecord, request: Any, num_kv: int) -> bool:
        """Whether the state after so many tokens is in the request's blocks, or was kept behind its step."""
        return not self._groups.states or num_kv == request.num_computed_tokens or num_kv in record.states

    def _room(self, tables: Sequence[Sequence[int]]) -> int:
        """Tokens that the blocks have room for, in every group that keeps tokens."""
        return min(map(len, tables)) * self._block_size

    def _sync(
        self,
        record: SchedulerRecord,
        name: str,
        tables: Sequence[Sequence[int]],
        upto: int,
        live: Any,
        finished: str | None = None,
        *,
        now: bool = False,
        over: bool = False,
    ) -> Job:
        """What brings the record up to `upto` tokens; from now on it counts as done."""
        used = tuple(tuple(table[: -(-upto // self._block_size)]) for table in self._groups.of_tokens(tables))
        states = self._groups.state_blocks(tables, upto) if upto == live.num_computed_tokens else ()
        record.tokens = list(live.all_token_ids[:upto])
        record.num_kv = upto
        if self._groups.states:
            record.points.add(upto)
        self._contents.note_computed(record, used, upto // self._block_size)
        return jobs.SaveBlocks(name, used, upto, finished, now, over, states)


def _is_past(job: jobs.WriteRecord, record: str, num_kv: int) -> bool:
    return job.record == record and job.num_kv > num_kv
