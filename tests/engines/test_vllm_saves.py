"""What vLLM's preemption of a request costs where a model keeps states, without a vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from thaw.core.errors import Busy, ThawError
from thaw.engines.served import protocol
from thaw.engines.served.budget import GUEST, Shares
from thaw.engines.served.scheduler.records import Records
from thaw.engines.vllm import jobs
from thaw.engines.vllm.block_tables import BlockTables, StateTable
from thaw.engines.vllm.scheduler.content_ids import BlockContents
from thaw.engines.vllm.scheduler.records import SchedulerRecord
from thaw.engines.vllm.scheduler.requests import RunningRequest
from thaw.engines.vllm.scheduler.saves import Saves

BLOCK, WANT, NOW = 256, 300, 310
RECORD, OTHER, EARLY, LATE = ("1" * 32, "2" * 32, "3" * 32, "4" * 32)
TABLES = BlockTables((1,), (StateTable(0, BLOCK),))


def write(name: str, num_kv: int, record: str = RECORD) -> jobs.WriteRecord:
    return jobs.WriteRecord(name, record, "store", ("pack",), 0, num_kv, num_kv + 1)


@pytest.fixture
def made() -> Any:
    """A request that has computed `NOW` tokens, from `WANT` on."""
    request = SimpleNamespace(
        request_id="r",
        num_computed_tokens=NOW,
        num_tokens=NOW + 1,
        all_token_ids=list(range(NOW + 1)),
        num_preemptions=0,
    )
    records: Records[SchedulerRecord] = Records(1000.0, Shares())
    contents = BlockContents(1, shared=False)
    record = SchedulerRecord(list(range(WANT)), WANT, contents.chain(1), live=request, points={WANT})
    records.keep(RECORD, record)
    queue: list[jobs.Job] = []
    refused: list[tuple[str, ThawError]] = []
    saves = Saves(records, contents, queue, BLOCK, TABLES, lambda *told: refused.append(told))
    saves.tables["r"] = [[7, 9], [3, 4]]
    run = RunningRequest(request, protocol.Run(id=OTHER, record=RECORD, source=RECORD, num_kv=WANT), WANT, computed=NOW)
    return SimpleNamespace(saves=saves, record=record, run=run, queue=queue, refused=refused)


def test_a_capture_reads_the_state_of_the_last_step_before_the_next_one(made: Any) -> None:
    assert made.saves.catch_up(RECORD, made.record, None) == NOW
    (sync,) = made.queue
    assert sync == jobs.SaveBlocks(RECORD, ((3, 4),), NOW, state_blocks=(9,)) and sync.before_forward
    assert made.record.points == {WANT, NOW}


def test_where_only_an_earlier_state_is_asked_for_nothing_is_promised(made: Any) -> None:
    assert made.saves.catch_up(RECORD, made.record, NOW - 1) == WANT
    assert made.queue == [] and made.record.points == {WANT}


def test_a_capture_in_the_step_of_a_preemption_is_refused_as_busy(made: Any) -> None:
    """And no other: one of what the record had before, and one of somebody else's."""
    made.saves.catch_up(RECORD, made.record, None)
    others = [write(EARLY, WANT), write(OTHER, NOW, OTHER)]
    made.queue += [write(LATE, NOW), *others]
    made.saves.rescue(made.run)
    assert len(made.queue) == 4 and made.refused == [], "it was not preempted"
    made.run.request.num_preemptions = 1
    made.saves.rescue(made.run)
    assert made.queue == [*others, jobs.ForkRecord(RECORD, RECORD, WANT, GUEST)]
    ((name, error),) = made.refused
    assert name == LATE and isinstance(error, Busy)
    assert (made.record.num_kv, made.record.points) == (WANT, {WANT})


def test_a_point_that_was_asked_for_stays_as_long_as_its_tokens_do(made: Any) -> None:
    """Beyond the end of what a stopped request keeps there is none; and a preempted one reads its answer again, in
    chunks that end elsewhere."""
    record, request = made.record, made.run.request
    record.stepped(NOW - 2, lasting=True)
    record.stepped(NOW - 1)
    assert record.points == {WANT, NOW - 2} and record.recent == [NOW - 1]
    record.require_state(NOW - 2)
    made.saves.catch_up(RECORD, record, None)
    assert record.points == {WANT, NOW - 2, NOW}
    record.stepped(NOW + 3, lasting=True)
    request.num_in_flight_tokens, request.status = 0, "RUNNING"
    made.saves.end(made.run, [[7, 9], [3, 4]])
    assert (record.num_kv, record.points) == (NOW, {WANT, NOW - 2, NOW})


def test_a_preempted_request_has_neither_its_points_nor_its_blocks_any_more(made: Any) -> None:
    record = made.record
    record.stepped(NOW - 2, lasting=True)
    record.chain = [5, 6, 7]
    made.run.request.num_preemptions = 1
    made.saves.rescue(made.run)
    assert record.points == {WANT} and record.chain == [5], "one full block of the tokens that it began with"
