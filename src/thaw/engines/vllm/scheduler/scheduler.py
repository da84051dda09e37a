"""The scheduler's side of the connector: what every record holds, what a request may load, what workers must do.

It runs in vLLM's engine process, between steps, and never touches KV. A *record* is a session's KV in the workers'
arena: append-only, named by the client, cut and copied by reference. A request names the record it continues from and
the one it extends; when it ends, what it computed is synced into that record and vLLM's LRU may have its blocks.

Blocks and bytes. vLLM finds a child's full blocks by the hash of their tokens, salted by lineage. Two siblings that
sampled the same tokens in batches of different shape have equal hashes and unequal bits. So the content of every full
block carries a number here (`chain` of a record, `content` of a block): before a request is scheduled, the blocks
that vLLM would hit must be the record's own, else the request gets a salt of its own and loads everything.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from thaw.core.errors import Busy, InvalidRequest, ThawError, Unsupported
from thaw.core.prefix import common_prefix
from thaw.engines.served import adapters, protocol
from thaw.engines.served.budget import EVERYBODY, GUEST, Caller
from thaw.engines.served.guard import guarded, unheard
from thaw.engines.served.late_groups import require_kept
from thaw.engines.served.mailbox import SCHEDULER, Mailbox
from thaw.engines.served.protocol import Answer, EngineFacts
from thaw.engines.served.scheduler.records import Records
from thaw.engines.vllm import jobs, support, versions
from thaw.engines.vllm.block_tables import BlockTables
from thaw.engines.vllm.jobs import Job
from thaw.engines.vllm.scheduler.commands import SchedulerCommands, refused, reply
from thaw.engines.vllm.scheduler.content_ids import BlockContents
from thaw.engines.vllm.scheduler.gang import Groups
from thaw.engines.vllm.scheduler.loads import Loads
from thaw.engines.vllm.scheduler.pins import BlockPins
from thaw.engines.vllm.scheduler.records import SchedulerRecord
from thaw.engines.vllm.scheduler.requests import RunningRequest, give_own_salt, is_aborted, is_failed
from thaw.engines.vllm.scheduler.saves import Saves
from thaw.engines.vllm.settings import VllmSettings

log = logging.getLogger("thaw.vllm")
MAIL_SWEEP_S = 300.0
NOTHING_IN_STEP = -1
"""Every load has more bytes."""


class SchedulerSide:
    """`tables`: which of vLLM's KV cache groups keep tokens, and which states; left out, all keep tokens. Of a model
    that keeps states every request loads the state that it goes on from, and the KV of its last block at least, beside
    the steps of others, where a failure ends it alone. `shares_blocks`: the full blocks before that may be those that
    lie in vLLM's cache, where they are the session's own; else it takes nothing from there."""

    def __init__(
        self,
        facts: EngineFacts,
        settings: VllmSettings,
        mail: Mailbox,
        token_nbytes: int,
        num_groups: int = 1,
        *,
        tables: BlockTables | None = None,
        shares_blocks: bool = False,
    ) -> None:
        self.facts, self._settings, self.mail = facts, settings, mail
        self._tables = BlockTables(tuple(range(num_groups))) if tables is None else tables
        self._has_states = bool(self._tables.states)
        self._block_size = facts.block_size
        self.records: Records[SchedulerRecord] = Records(settings.session_ttl_s, settings.shares())
        self.contents = BlockContents(self._tables.tokens, shared=shares_blocks or not self._has_states)
        self.pins = BlockPins(self.contents, settings, facts.num_blocks)
        self.queue: list[Job] = []
        """Jobs for the workers in the next step, after those that save what vLLM takes away."""
        self.on = settings.enabled
        self._commands = SchedulerCommands(self, settings.shares())
        self._runs: dict[str, RunningRequest] = {}
        self._groups = Groups()
        self._adapters = adapters.EngineAdapters()
        self._saving = Saves(
            self.records, self.contents, self.queue, facts.block_size, self._tables, self._refuse_command
        )
        in_step_nbytes = NOTHING_IN_STEP if self._has_states else settings.async_nbytes
        self._loads = Loads(self.records, facts.block_size, token_nbytes, in_step_nbytes)
        self._swept = time.monotonic()
        self.counters = dict.fromkeys(("captures", "hydrates", "forks", "refused", "loaded_tokens", "hit_tokens"), 0)

    def _refuse_command(self, name: str, error: ThawError) -> None:
        self.mail.answer(name, SCHEDULER, refused(error))

    def bind(self, pool: Any) -> None:
        self.contents.pool = pool

    def num_running(self) -> int:
        return len(self._runs)

    # -- a request arrives

    def arrived(self, request: Any) -> None:
        """Read its message; queue what the workers must do for it."""
        message = guarded(partial(protocol.parse, request.kv_transfer_params), partial(self._refuse, request, None))
        if message is None:
            return
        guarded(self._tidy, unheard)
        guarded(partial(self._take, request, message), partial(self._refuse, request, message))

    def _take(self, request: Any, message: protocol.Run | protocol.Command) -> None:
        self.mail.require_caller(message)
        self.mail.require_granted(message)
        self._forget(message.drop)
        if isinstance(message, protocol.Run):
            self._begin(request, message)
        else:
            self._commands.begin(request.request_id, message)

    def _refuse(self, request: Any, message: protocol.Message | None, error: ThawError) -> None:
        """Answer with the error; what is not held as a command then ends through a load that fails, before anything is
        computed. `message` None: it could not be read."""
        self._tell_refused(request, message, error)
        if request.request_id not in self._commands:
            run = message if isinstance(message, protocol.Run) else _no_run()
            self._runs[request.request_id] = RunningRequest(request, run, 0, error=error)
            if run.group is not None:
                self._groups.join(run.group, run.group_size, run.group_place, request.request_id)

    def _tell_refused(self, request: Any, message: protocol.Message | None, error: ThawError) -> None:
        """By mail, out of which `refusals` answers those who do not share it; to the operator in the log."""
        self.counters["refused"] += 1
        log.warning("thaw: request %s is refused (%s): %s", request.request_id, error.kind, error)
        if message is not None and not self._commands.holds(message.id, besides=request.request_id):
            self.mail.answer(message.id, SCHEDULER, refused(error))

    def _begin(self, request: Any, message: protocol.Run) -> None:
        if not self.on:
            raise Unsupported("thaw is switched off in this engine; plain requests work (thaw engine switch on)")
        support.require_alone(request.sampling_params, message)
        support.require_text(request)
        _require_grammar(request, message)
        adapters.require_same(message.adapter, self._adapter_of(request))
        caller = message.caller or GUEST
        early = message.ends_early and self._has_states
        states = sum(point < request.num_tokens + request.max_tokens for point in message.points if self._has_states)
        new = message.num_new(request.num_tokens)
        self.require_room(message.record, caller, new, ends_early=early, num_states=states)
        source = self._source(message)
        tokens = list(request.all_token_ids)
        want = message.num_kv
        if source is not None and message.source is not None:
            adapters.require_source(source.adapter, message.adapter)
            want = min(want, self.catch_up(message.source, source, want))
            same = common_prefix(source.tokens[:want], tokens)
            if same < want:
                raise InvalidRequest(f"the request's tokens differ from the session's at token {same} of {want}")
            self._require_state_to_go_on(source, message.num_kv, want, len(tokens))
        late = source.late if source is not None else ()
        require_kept(late, min(want, request.num_tokens - 1))
        chain = source.chain[: want // self._block_size] if source is not None else []
        self.queue.append(jobs.ForkRecord(message.record, message.source, want, caller))
        record = SchedulerRecord(tokens[:want], want, chain, live=request, caller=caller, late=late)
        record.adapter = message.adapter
        if source is not None and want and self._has_states:
            record.points = {want, *(point for point in source.points if point < want)}
        self.records.keep(message.record, record)
        salted = (request.cache_salt or "").startswith(protocol.SALT)
        run = self._runs[request.request_id] = RunningRequest(request, message, want, salted=salted)
        if message.group is not None:
            self._groups.join(message.group, message.group_size, message.group_place, request.request_id)
        alone = not salted and (self._has_states or bool(late))  # blocks without a window's first tokens, or a state's
        found = chain[: self._most_found(run)] if self._has_states else chain
        if alone or not self.contents.shared or self.contents.hits_foreign(request, found):
            give_own_salt(request)
        self._hide_last(run)
        self.counters["forks"] += message.source not in (None, message.record)

    def _adapter_of(self, request: Any) -> str | None:
        """The id of the adapter that vLLM runs the request under."""
        lora = getattr(request, "lora_request", None)
        if lora is None:
            return None
        support.require_adapter(lora)
        return self._adapters.id_of(lora.lora_int_id, lora.lora_path)

    def require_state(self, record: SchedulerRecord, num_kv: int) -> None:
        """Raises `NotKept` where the model keeps states, and the record has none after so many tokens."""
        if self._has_states:
            record.require_state(num_kv)

    def _require_state_to_go_on(self, source: SchedulerRecord, asked: int, num_kv: int, num_tokens: int) -> None:
        """Likewise, for a request of `num_tokens` tokens that is to go on after `asked`: `num_kv` of them are there."""
        self.require_state(source, asked)
        if self._has_states and not num_kv == asked < max(num_tokens, 1):
            raise InvalidRequest(
                f"num_kv={asked}: the session has {num_kv} tokens of KV, and the request {num_tokens} tokens, the last "
                "of which must run"
            )

    def require_room(
        self, record: str, caller: Caller, num_tokens: int, *, ends_early: bool = False, num_states: int = 0
    ) -> None:
        """Raises `Busy` where the caller may not keep one more record, or that many tokens and states more in some
        worker."""
        self.records.require_room(record, caller)
        for rank in range(self.facts.world_size):
            tight = self.mail.tight(rank)
            room = tight.get(caller) or tight.get(EVERYBODY)
            if room is not None:
                room.require(num_tokens, ends_early=ends_early, num_states=num_states)

    def _source(self, message: protocol.Run) -> SchedulerRecord | None:
        own = self.records.get(message.record)
        if own is not None and own.live is not None:
            twin = self._runs.get(own.live.request_id)
            if twin is not None and twin.message.id == message.id:  # vLLM has made several requests of one
                raise Unsupported(f"n in a request that carries kv_transfer_params[{protocol.KEY!r}]: {support.ONE}")
            raise Busy("the session is running already")
        if message.source is None:
            return None
        source = self.records.known(message.source)
        self.records.touch(message.source)
        return source

    def catch_up(self, name: str, record: SchedulerRecord, want: int | None) -> int:
        """How many tokens the record `name` has; of one that is running, those computed by now are synced first."""
        run = self._runs.get(record.live.request_id) if record.live is not None else None
        if run is not None:
            self._saving.rescue(run)
        return self._saving.catch_up(name, record, want)

    # -- what vLLM asks before it schedules a request

    def matched(self, request: Any, local: int) -> tuple[int | None, bool]:
        """(tokens to load beyond the `local` ones, whether in the background); None: ask again next step."""
        name = request.request_id
        if name in self._commands:
            waits = guarded(partial(self._commands.may_pass, name), unheard) is False
            return (None, False) if waits else (0, False)
        run = self._runs.get(name)
        if run is None:
            return 0, False
        found = None
        if run.error is None:
            found = guarded(partial(self._match, request, run, local), partial(self._stop, run))
        return self._ends_by_load(run, local) if found is None else found

    def _stop(self, run: RunningRequest, error: ThawError) -> None:
        """The request ends with this error: through a load that fails where one is to come, else at its end."""
        run.error = error
        self._tell_refused(run.request, run.message, error)

    def _match(self, request: Any, run: RunningRequest, local: int) -> tuple[int | None, bool]:
        if self._finds_too_much(run, local) or self._finds_the_last(run, local):
            return None, False
        if self._groups.waits(run.message.group, request.request_id):
            return None, False
        self._saving.rescue(run)
        self._replay(request, run)
        want = min(run.want, request.num_tokens - 1)
        if self._foreign(request, run, local):
            run.forget_hidden()
            give_own_salt(request)
            self._hide_last(run)
            return None, False
        missing = max(want - local, 0)
        if missing and not self._has_states and self._loads.is_led(run, want):
            return None, False
        run.local = local
        run.show()
        if not missing:
            return 0, False
        return missing, self._loads.in_background(missing)

    def _ends_by_load(self, run: RunningRequest, local: int) -> tuple[int, bool]:
        """A load that fails ends the request. Blocks that are the session's own stay known as such."""
        run.local = local
        run.show()
        return max(1, run.request.num_tokens - local), True

    def _finds_too_much(self, run: RunningRequest, local: int) -> bool:
        """A session has no KV for its last token, which runs again. Where that token fills a block, the engine that
        read it has its KV all the same, and one that hydrated it has not: so that both compute the same, in batches of
        one shape, the block is hidden and vLLM asked again. Not where it knows of more: siblings read that already."""
        size = self._block_size
        if self._has_states or run.found is not None or not run.want or (run.want + 1) % size:
            return False
        if not run.hidden and local == run.want + 1:
            run.hide(run.want // size)
            return True
        if len(run.hidden) > 1 and self.contents.has(run.hidden[1]):
            run.show()
            return True
        return False

    def _most_found(self, run: RunningRequest) -> int:
        """How many full blocks vLLM may have for a request of a model that keeps states: not the last ones, so that the
        state after them is always loaded, and no state of vLLM's own cache is gone on from."""
        return max(run.want - 1, 0) // self._block_size if self.contents.shared else 0

    def _hide_last(self, run: RunningRequest) -> None:
        if self._has_states:
            run.stand_in(self._most_found(run))

    def _finds_the_last(self, run: RunningRequest, local: int) -> bool:
        """Whether vLLM has found more of the request than it may, because it could not begin when it was asked before:
        it is asked again."""
        if not self._has_states or local <= self._most_found(run) * self._block_size:
            return False
        run.show()
        self._hide_last(run)
        return True

    def _replay(self, request: Any, run: RunningRequest) -> None:
        """Bring the grammar of a completion that goes on in its middle to where it was. vLLM asks for matches only when
        the grammar is ready; from the first new token on it advances it itself, also after a preemption."""
        start = run.message.grammar_from
        if start is None or run.replayed:
            return
        run.replayed = True
        prior = list(request.all_token_ids[start:])
        if prior and not request.structured_output_request.grammar.accept_tokens(request.request_id, prior):
            raise InvalidRequest(
                f"the grammar does not allow the {len(prior)} tokens that the completion has already: was it begun "
                "with another one?"
            )

    def _foreign(self, request: Any, run: RunningRequest, local: int) -> bool:
        record = self.records.get(run.message.record)
        if record is None:
            return False
        return self.contents.hits_foreign(request, record.chain[: local // self._block_size])

    def end_soon(self, name: str) -> None:
        """The request with the message `name` ends with its next token, by vLLM's own limit, unless it has ended. So
        its client hears all of its tokens, and the state that its last step leaves is that of the session's end."""
        for run in self._runs.values():
            if run.message.id == name:
                run.request.max_tokens = min(run.request.max_tokens, run.request.num_output_tokens + 1)

    # -- vLLM has given a request its blocks

    def allocated(self, request: Any, all_tables: jobs.Tables, num_external: int) -> None:
        name = request.request_id
        run = self._runs.get(name)
        tables = self._tables.of_tokens(all_tables)
        self.contents.renew(_from([all_tables[table.group] for table in self._tables.states], 0))
        if run is None:
            self.contents.renew(_from(tables, 0))
            return

        def failed(error: ThawError) -> None:
            self._stop(run, error)
            self.contents.renew(_from(tables, 0))
            self._take_back(name)
            if num_external:
                self.queue.append(jobs.Fail(name, tables, self._loads.in_background(num_external)))

        states = self._state_blocks(run, all_tables, num_external)
        guarded(partial(self._allocated, request, run, tables, num_external, states), failed)

    def _take_back(self, request: str) -> None:
        """Jobs by which workers would tell vLLM of this request."""
        self.queue[:] = [
            job for job in self.queue if request not in (getattr(job, "request", None), getattr(job, "finished", None))
        ]

    def _allocated(
        self,
        request: Any,
        run: RunningRequest,
        tables: jobs.Tables,
        num_external: int,
        states: Callable[[], tuple[int, ...]],
    ) -> None:
        if run.background and not num_external:
            run.given = run.want
            self.contents.renew(_from(tables, -(-run.want // self._block_size)))
            self._loads.ends(run)  # who is asked after it in this step shares its blocks, and starts with it
            return
        self.contents.renew(_from(tables, run.local // self._block_size))
        if run.error is not None:
            if num_external:  # else vLLM loads nothing for this request: it runs, and hears the error at its end
                self.queue.append(jobs.Fail(request.request_id, tables))
            return
        want = min(run.want, request.num_tokens - 1)
        run.given = run.local + num_external
        run.found = run.found or (run.local, num_external)
        self.counters["loaded_tokens"] += num_external
        self.counters["hit_tokens"] += run.local
        name, record = run.message.id, run.message.record
        if num_external:
            background = self._loads.in_background(num_external)
            start = want - num_external
            used = _upto(tables, -(-want // self._block_size))
            self.queue.append(jobs.Load(request.request_id, name, record, used, start, want, background, states()))
            self._note_loaded(run, used, start, want)
            run.background = background
            if background:
                self._loads.begins(run, want)
        elif want:
            self.queue.append(jobs.CheckRecord(request.request_id, name, record, _upto(tables, 1), want))

    def _state_blocks(
        self, run: RunningRequest, tables: jobs.Tables, num_external: int
    ) -> Callable[[], tuple[int, ...]]:
        """The blocks into which the state is to be loaded that the request continues from."""
        return partial(self._tables.state_blocks, tables, run.local + num_external)

    def _note_loaded(self, run: RunningRequest, tables: jobs.Tables, start: int, stop: int) -> None:
        record = self.records.get(run.message.record)
        if record is not None:
            self.contents.note_loaded(record, tables, start // self._block_size, stop // self._block_size)

    # -- a step is put together

    def collect(self, output: Any) -> list[Job]:
        """The jobs of this step; also learn from vLLM's output which blocks its requests have."""
        for run in self._runs.values():
            guarded(partial(self._saving.rescue, run), partial(self._stop, run))
        self._follow(output)
        self.pins.release()
        # The workers may still be computing the step before. They take these jobs after it, and before this one's
        # forward pass: rescues first, for the blocks that they read are written by loads in the queue and by that pass.
        out = [*self._saving.rescues, *self.queue]
        self._saving.rescues.clear()
        self.queue.clear()
        if any(isinstance(job, jobs.SaveBlocks) and job.before_forward for job in out):
            versions.put_jobs_before_forward(output)
        self.contents.step_begins()
        return out

    def _follow(self, output: Any) -> None:
        self._groups.step_begins()
        for new in output.scheduled_new_reqs:
            if new.req_id in self._runs:
                run = self._runs[new.req_id]
                there = partial(self._has_blocks, run, new.block_ids, new.num_computed_tokens)
                guarded(there, partial(self._stop, run))
                self._groups.begins(run.message.group)
                self._count(new.req_id, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for name, before in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self._count(name, before, output)
        for name, before, fresh in zip(cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True):
            if fresh is None:
                continue
            if name not in cached.resumed_req_ids:
                self.contents.renew(_from(fresh, 0))
            if name in self._runs:
                stop = partial(self._stop, self._runs[name])
                if name in cached.resumed_req_ids:
                    guarded(partial(self._has_blocks, self._runs[name], fresh, before), stop)
                else:
                    guarded(partial(self._has_more_blocks, name, fresh), stop)
        for name in output.finished_req_ids:
            self._saving.tables.pop(name, None)

    def _has_blocks(self, run: RunningRequest, tables: Sequence[Sequence[int]], num_computed: int) -> None:
        """It begins, or goes on after it was preempted."""
        name = run.request.request_id
        self._saving.tables[name] = [list(table) for table in tables]
        self._loads.ends(run)
        self._check_own(name, num_computed)

    def _has_more_blocks(self, name: str, fresh: Sequence[Sequence[int]]) -> None:
        tables = self._saving.tables.setdefault(name, [[] for _ in fresh])
        for table, blocks in zip(tables, fresh, strict=True):
            table.extend(blocks)

    def _count(self, name: str, before: int, output: Any) -> None:
        if name in self._runs:
            self._runs[name].computed = before + output.num_scheduled_tokens.get(name, 0)

    def _check_own(self, name: str, num_computed: int) -> None:
        """End the request if another connector of a `MultiConnector` has loaded some of its tokens: they were computed
        for somebody else's request, and the session's own bits would depend on it."""
        run = self._runs[name]
        strange = num_computed - run.given
        if strange <= 0 or run.error is not None or not run.salted or self._settings.others_keep_salt:
            return
        run.error = Unsupported(
            f"another connector of this engine loaded {strange} tokens of the session, which other requests computed: "
            "put thaw first among the connectors, open the session with share_prefix=True, or say others_keep_salt "
            "among thaw's options where that connector finds KV by vLLM's salted block hashes"
        )
        self._tell_refused(run.request, run.message, run.error)
        self.queue.append(jobs.Fail(name, self._tables.of_tokens(self._saving.tables[name]), background=False))

    def kept_states(self, output: Any) -> list[jobs.KeepState]:
        """What is to be kept of the states that this step computes, once it has: where somebody asked for it, and of
        requests that their clients may end some steps late. Of others the state lies in their blocks until the next
        step, and whoever needs it is served before that (`Saves`)."""
        if not self._has_states:
            return []
        found: list[jobs.KeepState] = []
        for name, run in self._runs.items():
            told = run.message
            wanted = told.ends_early or run.computed in told.points
            if name in output.num_scheduled_tokens and told.keep and wanted and run.error is None:
                guarded(
                    partial(self._keep_state, found, run, output.kv_connector_block_state), partial(self._stop, run)
                )
        return found

    def _keep_state(self, found: list[jobs.KeepState], run: RunningRequest, blocks: Any) -> None:
        record, name = self.records.get(run.message.record), run.request.request_id
        if record is None or record.live is not run.request:
            return
        where = self._tables.state_blocks(blocks.get_block_ids(name), run.computed)
        lasting = run.computed in run.message.points
        found.append(jobs.KeepState(run.message.record, where, run.computed, lasting))
        record.stepped(run.computed, lasting=lasting)

    def _states_of(self, name: str) -> tuple[int, ...]:
        record = self.records.get(name)
        return () if record is None else record.states

    # -- a request ends

    def finished(self, request: Any, tables: Sequence[Sequence[int]]) -> tuple[bool, dict[str, Any] | None]:
        """(whether its blocks must be held until the workers have synced them, what goes back with its output)."""
        name = request.request_id
        if name in self._commands:
            return False, guarded(partial(self._commands.end, name), unheard)
        run = self._runs.pop(name, None)
        if run is None:
            return False, None
        if run.message.group is not None:
            self._groups.start(run.message.group)
        self._loads.ends(run)

        def failed(error: ThawError) -> None:
            self._stop(run, error)
            self._take_back(name)
            self._forget((run.message.record,))

        done = guarded(partial(self._end, request, run, tables), failed)
        if done is None:
            assert run.error is not None
            return False, reply(run.message.id, refused(run.error))
        return done

    def _end(
        self, request: Any, run: RunningRequest, tables: Sequence[Sequence[int]]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._saving.rescue(run)
        if run.error is not None:
            held, _ = self._settle(request, run, tables)
            return held, reply(run.message.id, refused(run.error))
        if is_failed(request) and run.found is None and run.message.grammar_from is not None:
            error = InvalidRequest("vLLM could not make a grammar of structured_outputs; the engine's log says why")
            self._tell_refused(request, run.message, error)
        held, answer = self._settle(request, run, tables)
        wanted = is_aborted(request) or (run.message.mail and not is_failed(request))
        if wanted and run.message.caller is not None:
            self.mail.answer(run.message.id, SCHEDULER, answer)
        return held, reply(run.message.id, answer)

    def _settle(self, request: Any, run: RunningRequest, tables: Sequence[Sequence[int]]) -> tuple[bool, Answer]:
        held, num_kv = self._saving.end(run, tables)
        local, external = run.found or (0, 0)
        return held, Answer(
            num_tokens=request.num_tokens,
            num_kv=num_kv,
            local=local,
            external=external,
            preempted=request.num_preemptions,
            kept=run.message.keep,
            points=self._states_of(run.message.record),
        )

    def counts(self) -> dict[str, int]:
        """What has happened so far."""
        return {
            **self.counters,
            "preempted": self._saving.num_preempted,
            "split_groups": self._groups.num_split,
            "shuffled_groups": self._groups.num_shuffled,
        }

    def metrics(self) -> dict[str, int]:
        """Counts that only this side knows."""
        return {**self.counts(), "records": len(self.records), "pinned_blocks": self.pins.num_blocks()}

    # -- what has had its time

    def _tidy(self) -> None:
        """What has had its time ends: pins, records that nobody used, mail that nobody fetched."""
        now = time.monotonic()
        self.pins.release()
        self._forget(self.records.unused(self.records.overdue()))
        if now - self._swept > MAIL_SWEEP_S:
            self._swept = now
            self.mail.sweep()

    def _forget(self, names: Iterable[str]) -> None:
        gone = tuple(name for name in names if self.records.drop(name))
        for name in gone:
            self.pins.unpin(name)
        if gone:
            self.queue.append(jobs.Forget(gone))

    def reset(self) -> None:
        """vLLM asks connectors to drop what they hold in its blocks, also before it sleeps: pins end; records are in
        the arena and stay."""
        self.pins.reset()
        self.contents.forget_uncached()


def _from(tables: Sequence[Sequence[int]], first: int) -> Iterator[int]:
    """The blocks of all groups, from a place in their tables on."""
    return (block for table in tables for block in table[first:])


def _upto(tables: Sequence[Sequence[int]], end: int | None) -> jobs.Tables:
    return tuple(tuple(table[:end]) for table in tables)


def _require_grammar(request: Any, message: protocol.Run) -> None:
    """Raise `InvalidRequest` where the message counts on a grammar that is not there, or on tokens."""
    start = message.grammar_from
    if start is None:
        return
    if not request.use_structured_output:
        raise InvalidRequest("grammar_from: the request's structured_outputs say nothing, so there is no grammar")
    if start > request.num_tokens:
        raise InvalidRequest(f"grammar_from={start}: the request has {request.num_tokens} tokens")


def _no_run() -> protocol.Run:
    """Stands for a message that begins nothing."""
    return protocol.Run(id=secrets.token_hex(16), record=secrets.token_hex(16))
