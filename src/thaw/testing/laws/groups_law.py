"""Laws 1 and 5 by cache group: no group is guessed, and each group's bytes are those of its own tokens.

Every engine is asked for each of its groups, whatever their kind; the control of a state of another token needs one
that has point states.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from thaw.core.cache import columns, point_groups, token_groups
from thaw.core.errors import CorruptBlob
from thaw.engines.base import Engine, HydratePlan
from thaw.testing.laws.kit import EngineKit, Lab, bits, greedy, same, seeded


class GroupsLaw(EngineKit):
    def test_every_blob_is_of_its_groups_shape(self, engine: Engine, lab: Lab) -> None:
        """As many as the group says, each of as many bytes as its tokens take."""
        captured = lab.capture(engine, lab.begin(engine, 300))
        where = {place.blob: place for place in captured.blobs}
        groups = captured.identity.groups
        for segment in captured.segments:
            end = segment.start + segment.length
            for group in token_groups(groups):
                ids, first = segment.blobs.get(group.name, ()), segment.first.get(group.name, segment.start)
                assert len(ids) == group.num_blobs or (not ids and end <= group.covers(captured.num_kv).start)
                for blob in ids:
                    nbytes = len(lab.read(where[blob]))
                    assert nbytes == group.token_nbytes_per_blob * (end - first)
            for point in segment.points:
                assert set(point.blobs) == {state.name for state in point_groups(groups)}
                for state in point_groups(groups):
                    sizes = [where[blob].nbytes for blob in point.blobs[state.name]]
                    assert sizes == [nbytes for _, nbytes in state.blobs]
        assert sum(len(ids) for ids in captured.segments[-1].blobs.values()) == len(columns(groups))

    def test_a_plan_that_lacks_a_group_is_refused_by_name(self, engine: Engine, other: Engine, lab: Lab) -> None:
        plan = lab.plan(lab.capture(engine, lab.begin(engine, 300)))
        for name, bad in _without_a_group(plan):
            with pytest.raises(CorruptBlob) as refusal:
                lab.hydrate(other, bad)
            assert "state" in str(refusal.value) or name in str(refusal.value)
        assert lab.hydrate(other, plan).proof.hit

    def test_blobs_that_begin_a_token_late_are_refused(self, engine: Engine, other: Engine, lab: Lab) -> None:
        """A window one token short, for one."""
        plan = lab.plan(lab.capture(engine, lab.begin(engine, 300)))
        for group in token_groups(plan.identity.groups):
            needed = group.covers(plan.num_kv).start
            slices = tuple(
                msgspec.structs.replace(piece, first={**piece.first, group.name: max(needed, piece.start) + 1})
                if needed < piece.start + piece.length
                else piece
                for piece in plan.slices
            )
            with pytest.raises(CorruptBlob):
                lab.hydrate(other, msgspec.structs.replace(plan, slices=slices))

    def test_negative_control_a_state_of_another_token_changes_the_logprobs(
        self, engine: Engine, other: Engine, lab: Lab
    ) -> None:
        """One token older and said to be of the point; and said to be what it is, which is refused."""
        session = lab.begin(engine, 300)
        plan = lab.plan(lab.capture(engine, session))
        right = lab.one(engine, session, greedy(4), (5,))
        same(right, lab.one(other, lab.hydrate(other, plan).session, greedy(4), (5,)))
        if not point_groups(plan.identity.groups):
            assert not plan.points
            return
        older, own = plan.points[-2], plan.points[-1]
        assert (older.token, own.token) == (plan.num_kv - 1, plan.num_kv)
        for group in own.blobs:
            mixed = msgspec.structs.replace(own, blobs={**own.blobs, group: older.blobs[group]})
            wrong_plan = msgspec.structs.replace(plan, points=(*plan.points[:-1], mixed))
            wrong = lab.one(other, lab.hydrate(other, wrong_plan).session, greedy(4), (5,))
            assert bits(right.logprobs)[0] != bits(wrong.logprobs)[0], group
        with pytest.raises(CorruptBlob, match=str(plan.num_kv)):
            lab.hydrate(other, msgspec.structs.replace(plan, points=plan.points[:-1]))

    def test_what_a_plan_needs_is_enough(self, engine: Engine, other: Engine, lab: Lab) -> None:
        """Without the blobs that no group needs at the point, and without the states of other tokens; also where a
        window begins with the last token of a segment, and with the first of the next."""
        for count in (600, *window_edges(engine)):
            session = lab.begin(engine, count)
            plan = least(lab.plan(lab.capture(engine, session)))
            restored = lab.hydrate(other, plan)
            assert restored.proof.hit
            twin = lab.twin(other, restored.session)
            same(lab.one(engine, session, seeded(12), (5,)), lab.one(other, restored.session, seeded(12), (5,)))
            moved = lab.move(other, twin, engine)
            same(lab.one(other, twin, seeded(4)), lab.one(engine, moved, seeded(4)))


def window_edges(engine: Engine) -> list[int]:
    """Numbers of tokens at which a group's window begins with token 255, and with 256."""
    wide = [group for group in token_groups(engine.info.groups) if 0 not in group.covers(engine.info.max_model_len)]
    edges = [next(n for n in range(256, 1 << 20) if group.covers(n).start == at) for group in wide for at in (255, 256)]
    return [n for n in edges if n < engine.info.max_model_len - 32]


def least(plan: HydratePlan) -> HydratePlan:
    """`plan` with what is needed at its point alone."""
    start = {group.name: group.covers(plan.num_kv).start for group in token_groups(plan.identity.groups)}
    slices = tuple(
        msgspec.structs.replace(
            piece, blobs={g: places for g, places in piece.blobs.items() if start[g] < piece.start + piece.length}
        )
        for piece in plan.slices
    )
    points = tuple(point for point in plan.points if point.token == plan.num_kv)
    return msgspec.structs.replace(plan, slices=slices, points=points)


def _without_a_group(plan: HydratePlan) -> Iterator[tuple[str, HydratePlan]]:
    for group in token_groups(plan.identity.groups):
        slices = tuple(
            msgspec.structs.replace(piece, blobs={g: p for g, p in piece.blobs.items() if g != group.name})
            for piece in plan.slices
        )
        yield group.name, msgspec.structs.replace(plan, slices=slices)
    for state in point_groups(plan.identity.groups):
        points = tuple(
            msgspec.structs.replace(point, blobs={g: p for g, p in point.blobs.items() if g != state.name})
            for point in plan.points
        )
        yield state.name, msgspec.structs.replace(plan, points=points)
