"""Law 1, bytes: KV restored equals KV captured, byte for byte; damage is noticed; and the numbers do depend on it."""

from __future__ import annotations

import itertools
import os

import pytest

from thaw.core.cache import columns, point_groups, token_groups
from thaw.core.errors import CorruptBlob, Damaged
from thaw.engines.base import Captured, Engine
from thaw.testing.laws.kit import EngineKit, Lab, bits, can, greedy, kv_complete, seeded
from thaw.testing.plans import flip_byte, halves_swapped, tampered


def blob_ids(captured: Captured) -> list[tuple[str, ...]]:
    """All blobs of each segment: of its tokens group by group, then of its point states."""
    named = [[segment.blobs, *(point.blobs for point in segment.points)] for segment in captured.segments]
    return [tuple(blob for blobs in one for group in sorted(blobs) for blob in blobs[group]) for one in named]


class BytesLaw(EngineKit):
    @pytest.mark.parametrize("count", [1, 255, 256, 257, 700])
    def test_restored_kv_equals_captured_kv_byte_for_byte(
        self, engine: Engine, other: Engine, lab: Lab, count: int
    ) -> None:
        session = lab.begin(engine, count)
        first = lab.capture(engine, session)
        plan = lab.plan(first)
        again = lab.capture(other, lab.hydrate(other, plan).session)
        assert kv_complete(engine, first.num_kv, count) and kv_complete(other, plan.num_kv, count)
        assert again.num_kv == plan.num_kv
        assert prefix_bytes(lab, first, plan.num_kv) == prefix_bytes(lab, again, plan.num_kv)
        assert first.num_kv > again.num_kv or blob_ids(first) == blob_ids(again)
        assert len(blob_ids(first)) == -(-first.num_kv // 256)
        assert first.boundary == again.boundary
        assert (first.boundary is not None) == can(engine, "boundary")

    def test_decoded_kv_travels_like_prefilled_kv(self, engine: Engine, other: Engine, lab: Lab) -> None:
        """The partial last block and what decoding wrote are in the snapshot too."""
        session = lab.begin(engine, 250)
        lab.one(engine, session, seeded(16))
        first = lab.capture(engine, session)
        again = lab.capture(other, lab.hydrate(other, lab.plan(first)).session)
        assert len(first.tokens) == 266 and 265 <= first.num_kv <= 266
        assert again.num_kv >= 265
        assert prefix_bytes(lab, first, 265) == prefix_bytes(lab, again, 265)

    def test_everything_of_the_state_comes_back(self, engine: Engine, other: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 40, seed=123)
        lab.one(engine, session, seeded(5, logprobs=2), (1, 2, 3))
        before = engine.view(session)
        after = other.view(lab.move(engine, session, other))
        assert (after.tokens, after.turns, after.seed, after.salt) == (before.tokens, before.turns, 123, before.salt)
        assert [turn.kind for turn in after.turns] == ["prompt", "prompt", "completion"]
        assert not after.running and not after.parked

    def test_a_capture_writes_only_what_is_new(self, engine: Engine, other: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 300)
        first = lab.capture(engine, session)
        twin = lab.twin(engine, session)
        expected = lab.one(engine, twin, greedy(4), (9, 8, 7))
        lab.one(engine, session, greedy(4), (9, 8, 7))
        second = lab.capture(engine, session, base=first.num_kv)
        assert min(segment.start for segment in second.segments) == first.num_kv
        assert set(blob_ids(first)).isdisjoint(blob_ids(second))
        restored = lab.hydrate(other, lab.plan(second, first))
        assert restored.session and other.view(restored.session).turns[-1].logprobs == expected.logprobs
        assert prefix_bytes(lab, second, 306, first) == prefix_bytes(lab, lab.capture(other, restored.session), 306)

    def test_kv_once_captured_is_what_the_session_goes_on_with(self, engine: Engine, lab: Lab) -> None:
        """KV only grows: a later capture may build on an earlier one, so nothing in it may be rewritten."""
        session = lab.begin(engine, 300)
        captures = [lab.capture(engine, session)]
        for prompt in ((), (9, 8, 7), ()):
            lab.one(engine, session, seeded(5), prompt)
            captures.append(lab.capture(engine, session))
        for early, late in itertools.pairwise(captures):
            assert prefix_bytes(lab, early, early.num_kv) == prefix_bytes(lab, late, early.num_kv)

    @pytest.mark.parametrize("count, at", [(255, None), (256, None), (400, None), (600, 256), (600, 400)])
    def test_a_live_child_computes_what_a_hydrated_one_does(
        self, engine: Engine, other: Engine, lab: Lab, count: int, at: int | None
    ) -> None:
        """Also where the point ends a block of the engine's: bits depend on how many tokens a step has."""
        session = lab.begin(engine, count)
        plan = lab.plan(lab.capture(engine, session), at=at)
        live = lab.one(engine, lab.twin(engine, session, at=at), greedy(4), (5, 6))
        hydrated = lab.one(other, lab.hydrate(other, plan).session, greedy(4), (5, 6))
        assert live.num_cached_tokens == hydrated.num_cached_tokens
        assert bits(live.logprobs) == bits(hydrated.logprobs)

    def test_a_damaged_blob_is_refused_by_name(self, engine: Engine, other: Engine, lab: Lab) -> None:
        plan = lab.plan(lab.capture(engine, lab.begin(engine, 300)))
        lab.hydrate(other, plan)
        victim = plan.slices[-1].blobs[plan.identity.groups[0].name][-1]
        flip_byte(lab.packs, victim, at=victim.nbytes - 1)
        with pytest.raises(CorruptBlob, match=victim.blob):
            lab.hydrate(other, plan)

    def test_a_cut_off_or_missing_pack_is_refused(self, engine: Engine, other: Engine, lab: Lab) -> None:
        plan = lab.plan(lab.capture(engine, lab.begin(engine, 300)))
        pack = lab.packs / plan.slices[-1].blobs[plan.identity.groups[0].name][-1].pack
        os.truncate(pack, pack.stat().st_size // 2)
        with pytest.raises(CorruptBlob):
            lab.hydrate(other, plan)
        pack.unlink()
        with pytest.raises(Damaged):
            lab.hydrate(other, plan)

    @pytest.mark.parametrize("piece", [0, -1])
    def test_negative_control_one_block_of_wrong_kv_changes_the_logprobs(
        self, engine: Engine, other: Engine, lab: Lab, piece: int
    ) -> None:
        """Corrupted and hashed again, so accepted: if this changed nothing, no test here would prove anything. Each
        group that needs these tokens shows it."""
        session = lab.begin(engine, 400)
        plan = lab.plan(lab.capture(engine, session))
        right = lab.one(engine, session, greedy(8), (5,))
        same_again = lab.one(other, lab.hydrate(other, plan).session, greedy(8), (5,))
        assert bits(right.logprobs) == bits(same_again.logprobs)
        victim = plan.slices[piece]
        last = min(victim.start + victim.length, plan.num_kv) - 1
        needing = [group for group in token_groups(plan.identity.groups) if last in group.covers(plan.num_kv)]
        assert needing, "a token group needs the last tokens"
        for group in needing:
            wrong_plan = tampered(plan, halves_swapped, piece=piece % len(plan.slices), group=group.name)
            wrong = lab.one(other, lab.hydrate(other, wrong_plan).session, greedy(8), (5,))
            assert right.logprobs[0] != wrong.logprobs[0], group


def prefix_bytes(lab: Lab, captured: Captured, count: int, *earlier: Captured) -> list[bytes]:
    """KV bytes of tokens [0, count), one entry a head (of other groups, a blob), then those of the point states after
    at most `count` tokens; however the captures were cut into segments."""
    where = {x.blob: x for part in (*earlier, captured) for x in part.blobs}
    segments = [s for part in (*earlier, captured) for s in part.segments]
    out = []
    for group, number in columns(captured.identity.groups):
        planes = [bytearray() for _ in group.planes]
        for segment in segments:
            data = lab.read(where[segment.blobs[group.name][number]])
            used, at = max(0, min(segment.length, count - segment.start)), 0
            for plane, width in zip(planes, group.planes, strict=True):
                plane += data[at : at + used * width]
                at += segment.length * width
        out.append(b"".join(planes))
    states = [point for s in segments for point in s.points if point.token <= count]
    named = [(point.token, group, blob) for point in states for group, ids in point.blobs.items() for blob in ids]
    return out + [lab.read(where[blob]) for *_, blob in sorted(named)]


def kv_nbytes(captured: Captured) -> int:
    """What a capture's tokens, as far as each group has them, and its point states take."""
    token = {group.name: group.token_nbytes for group in token_groups(captured.identity.groups)}
    state = {group.name: group.nbytes for group in point_groups(captured.identity.groups)}
    ends = [(s, s.start + s.length) for s in captured.segments]
    tokens = sum(token[group] * (end - s.first.get(group, s.start)) for s, end in ends for group in s.blobs)
    return tokens + sum(state[group] for s in captured.segments for point in s.points for group in point.blobs)
