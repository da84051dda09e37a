"""What one caller, and what all of them, may keep in an engine that is served."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from thaw.core.cache import CacheGroup, FullKV, PointState, StatePart
from thaw.core.errors import Busy, InvalidRequest, StorageFailed
from thaw.core.objects import Id
from thaw.engines.served import protocol
from thaw.engines.served.budget import EVERYBODY, GUEST, Budget, Shares
from thaw.engines.served.scheduler.records import Records
from thaw.engines.served.worker.rank_groups import RankGroups
from thaw.receipt import format as receipts
from thaw.testing.messages import HOSTILE, MALFORMED

torch = pytest.importorskip("torch")
from thaw.engines.served.worker.host_cache import TIGHT_TOKENS, HostCache, HostRecord, Piece  # noqa: E402

ONE, TWO = "1" * 32, "2" * 32
TOKEN = 2 * 1 * 2 * 8 * 4
"""Bytes of a token's KV here: heads, layers, K and V, head_dim, float32."""


@dataclass
class Record:
    caller: str
    live: Any = None
    touched: float = 0.0


def arena(memory: int, files: int, shares: Shares = Shares(), folder: Path | None = None) -> HostCache:  # noqa: B008
    """Room for so many tokens in memory and in files."""
    full = FullKV(name="full", first_layer=0, num_layers=1, num_kv_heads=2, head_dim=8, dtype="float32")
    return HostCache(memory * TOKEN, folder, RankGroups((full,)), spill_nbytes=files * TOKEN, shares=shares)


def test_every_caller_has_its_share_and_all_have_the_whole() -> None:
    budget = Budget("things", 100, Shares(caller=0.6, guests=0.1))
    budget.take(ONE, 60)
    with pytest.raises(Busy, match=r"things: this caller has 60 of 60 \(caller_fraction 0\.6\)"):
        budget.require(ONE)
    budget.require(TWO, 40)
    with pytest.raises(Busy, match="things: all callers together have 60 of 100"):
        budget.require(TWO, 41)
    budget.take(GUEST, 10)
    with pytest.raises(Busy, match=r"do not share the engine's mail folder have 10 of 10 \(guest_fraction 0\.1\)"):
        budget.require(GUEST)
    budget.give_back(ONE, 1)
    budget.require(ONE)


def test_a_model_that_keeps_states_has_room_for_tokens_beside_those_of_a_request() -> None:
    full = FullKV(name="full", first_layer=0, num_layers=1, num_kv_heads=2, head_dim=8, dtype="float32")
    part = StatePart(name="recurrent", shape=(4, 8), dtype="float32", num_heads=2)
    point = PointState(name="state", first_layer=1, num_layers=2, parts=(part,))
    groups, nbytes = RankGroups((full, point)), 2 * 2 * 4 * 8 * 4
    assert groups.state_nbytes == point.nbytes == nbytes
    made = HostCache(10 * nbytes, None, groups, spill_nbytes=0, shares=Shares(), early_states=8)
    assert made.room(ONE).num_tokens == 9 * nbytes // TOKEN and made.room(ONE).num_early == nbytes // TOKEN
    kept = made.allocate_states(ONE)
    with pytest.raises(Busy, match=r"no room to keep 1 tokens: arena: .*; beside its tokens a request keeps states of"):
        made.room(ONE).require(1, ends_early=True)
    made.room(ONE).require(8 * nbytes // TOKEN)
    with pytest.raises(Busy, match="no room to keep"):
        made.room(ONE).require(8 * nbytes // TOKEN + 1)
    del kept
    made.room(ONE).require(nbytes // TOKEN, ends_early=True)


def test_nothing_is_remembered_of_callers_that_have_nothing() -> None:
    budget = Budget("things", 10, Shares())
    for i in range(100):
        budget.take(f"{i:032x}")
        budget.give_back(f"{i:032x}")
    assert budget.callers() == [] and budget.total == 0


def test_guests_fill_their_part_of_memory_then_of_the_disk_and_no_more(tmp_path: Path) -> None:
    one = arena(4000, 8000, Shares(guests=0.25), tmp_path)
    first = one.allocate(1000, GUEST)
    assert (one.used, one.spilled) == (1000 * TOKEN, 0)
    second = one.allocate(1500, GUEST)
    assert one.spilled == 1500 * TOKEN, "the rest of the memory is for others"
    with pytest.raises(StorageFailed, match=r"arena: callers that do not share.*; spill: callers that do not share"):
        one.allocate(501, GUEST)
    assert one.used == 2500 * TOKEN, "what is refused takes nothing"
    assert one.room(GUEST).num_tokens == 500
    third = one.allocate(500, GUEST)
    room = one.tight()[GUEST]
    assert room.num_tokens == 0 and "arena: callers" in room.why and "spill: callers" in room.why
    room.require(0)
    with pytest.raises(Busy, match=r"no room to keep 1 tokens: .*guest_fraction 0\.25"):
        room.require(1)
    assert one.room(ONE).num_tokens == 6000
    mine = one.allocate(3000, ONE)
    assert one.spilled == 2000 * TOKEN, "who shares the mail still has memory"
    del first, second, third, mine
    gc.collect()
    assert (one.used, one.spilled, one.room(GUEST).num_tokens) == (0, 0, 2000)


def test_what_a_fork_holds_counts_until_nobody_has_it() -> None:
    one = arena(1000, 0, Shares(caller=0.5))
    parent = HostRecord((Piece(0, 500, one.allocate(500, ONE)),), epoch=0, caller=ONE)
    child = HostRecord(parent.cut(10), epoch=0, caller=ONE)
    del parent
    gc.collect()
    assert one.used == 500 * TOKEN
    with pytest.raises(StorageFailed, match=r"this caller has 0\.1 MiB of 0\.1 MiB \(caller_fraction 0\.5\)"):
        one.allocate(1, ONE)
    assert one.allocate(1, TWO) is not None
    del child
    gc.collect()
    assert one.used == 0 and one.allocate(500, ONE) is not None


def test_an_arena_with_little_room_has_little_for_everybody() -> None:
    one = arena(2 * TIGHT_TOKENS, 0)
    assert one.tight() == {}
    held = one.allocate(TIGHT_TOKENS + 1, ONE)
    assert {caller: room.num_tokens for caller, room in one.tight().items()} == dict.fromkeys(
        (ONE, GUEST, EVERYBODY), TIGHT_TOKENS - 1
    )
    with pytest.raises(StorageFailed, match="all callers together have"):
        one.allocate(TIGHT_TOKENS, TWO)
    del held


def test_memory_that_was_given_back_is_used_again_though_something_is_spilled(tmp_path: Path) -> None:
    one = arena(100, 1000, folder=tmp_path)
    first, beyond = one.allocate(100, ONE), one.allocate(100, ONE)
    del first
    again = one.allocate(100, ONE)
    assert one.spilled == 100 * TOKEN and beyond is not None and again is not None


def test_records_are_counted_by_caller() -> None:
    records: Records[Record] = Records(60.0, Shares(guests=0.00002))
    for i in range(2):
        records.require_room(f"{i}", GUEST)
        records.keep(f"{i}", Record(GUEST))
    with pytest.raises(Busy, match="records: callers that do not share the engine's mail folder have 2 of 2"):
        records.require_room("2", GUEST)
    records.require_room("1", GUEST)  # it is there: no new one
    records.require_room("2", ONE)
    records.keep("1", Record(GUEST))
    records.drop("0")
    records.require_room("2", GUEST)


def test_too_many_records_are_refused_and_nobodys_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thaw.engines.served.scheduler.records.MAX_RECORDS", 3)
    records: Records[Record] = Records(60.0, Shares())
    for i in range(3):
        records.keep(f"{i}", Record(ONE))
    with pytest.raises(Busy, match="records: all callers together have 3 of 3"):
        records.require_room("3", TWO)
    assert records.overdue() == ()


@pytest.mark.parametrize("name", sorted(MALFORMED))
def test_what_is_no_message_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        protocol.parse({protocol.KEY: HOSTILE[name]})


@pytest.mark.parametrize("name", sorted(HOSTILE.keys() - MALFORMED))
def test_the_others_are_messages(name: str) -> None:
    message = protocol.parse({protocol.KEY: HOSTILE[name]})
    assert message is not None and message.in_reply is (message.caller is None)


@pytest.mark.parametrize(
    ("kind", "good"),
    [
        (protocol.Name, "a" * 32), (protocol.PackName, "x.safetensors"), (protocol.StoreName, "3" * 32),
        (Id, "b3:" + "0" * 64), (receipts.Name, "a-goal"), (receipts.Digest, "b3:" + "0" * 64),
    ],
    ids=["a message's name", "a pack", "a store", "an object", "a receipt's name", "a receipt's digest"],
)  # fmt: skip
def test_a_line_break_is_no_part_of_a_name(kind: Any, good: str) -> None:
    assert msgspec.convert(good, kind) == good
    for bad in (good + "\n", "\n" + good, good + "\n" + good):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(bad, kind)


def test_a_line_break_is_no_part_of_a_cache_groups_name() -> None:
    fields = {
        "name": "full", "kind": "full", "first_layer": 0, "num_layers": 1, "num_kv_heads": 1, "head_dim": 8,
        "dtype": "float32",
    }  # fmt: skip
    msgspec.convert(fields, CacheGroup)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**fields, "name": "full\n"}, CacheGroup)
