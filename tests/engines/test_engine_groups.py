"""The law book on `fake` engines of other cache groups: two full ones; a full one, a window and a point state; a latent
one. And on what an engine has that, as real ones do, keeps the window and the state of a session's end alone."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from thaw.core.cache import keeps_all
from thaw.core.errors import NotKept
from thaw.engines import load_engine
from thaw.engines.base import Engine, GenerateRequest
from thaw.engines.embedded.weights import WeightsWatch
from thaw.engines.fake.shapes import SHAPES, WINDOW
from thaw.testing import EngineTests
from thaw.testing.laws.bytes_law import blob_ids
from thaw.testing.laws.groups_law import GroupsLaw
from thaw.testing.laws.kit import Lab, Load, ids, same, seeded
from thaw.testing.laws.proof_law import ProofLaw


class OfGroups(EngineTests):
    changes_weights = True
    options: ClassVar[dict[str, Any]] = {}

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls) -> Load:
        return lambda **changes: load_engine("fake", **{**cls.options, **changes})

    def change_weights(self, engine: Engine) -> None:
        engine._backend.weights[0] ^= 0x55  # type: ignore[attr-defined]

    def own_weights(self, engine: Engine) -> str:
        return str(self.options.get("seed", 0))

    def guard_off(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(WeightsWatch, "_look", lambda self: None)


class TestTwoFullGroups(OfGroups):
    options: ClassVar = {"groups": "two"}


class TestHybrid(OfGroups):
    """`seed`: a model that says its end token often enough."""

    options: ClassVar = {"groups": "hybrid", "seed": 3}


class TestLatent(OfGroups):
    options: ClassVar = {"groups": "latent"}


class TestHybridOfPresentStates(GroupsLaw, ProofLaw):
    """The chapters that ask for no earlier token of a session; then what holds of its end and of earlier tokens."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls) -> Load:
        return lambda **changes: load_engine("fake", groups="hybrid", interior=False, **changes)

    def test_an_earlier_token_is_refused_and_the_tokens_that_are_kept_are_named(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 300)
        assert "interior-points" not in engine.info.capabilities and not keeps_all(engine.info.groups)
        with pytest.raises(NotKept, match=r"99 tokens.*299, 300 tokens.*`reread`"):
            lab.fork(engine, session, at=100)
        assert engine.view(engine.reread(session, 100).result()).num_kv == 100
        lab.one(engine, session, seeded(20))
        with pytest.raises(NotKept, match="318, 319 tokens"):
            lab.fork(engine, session, at=310)

    @pytest.mark.parametrize("count", [1, 39, 40, 41, 256, 257, 700])
    def test_restored_bytes_equal_captured_bytes(self, engine: Engine, other: Engine, lab: Lab, count: int) -> None:
        session = lab.begin(engine, count)
        first = lab.capture(engine, session)
        restored = lab.hydrate(other, lab.plan(first)).session
        assert blob_ids(lab.capture(other, restored)) == blob_ids(first)
        parked = other.park(restored).result()
        assert parked.parked and blob_ids(lab.capture(other, restored)) == blob_ids(first)
        same(lab.one(engine, session, seeded(6), (1,)), lab.one(other, restored, seeded(6), (1,)))

    def test_the_end_and_the_token_before_it_can_be_forked_from(self, engine: Engine, other: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 300)
        whole = lab.one(engine, lab.twin(engine, session), seeded(12))
        same(whole, lab.one(engine, lab.twin(engine, session, at=300), seeded(12)))
        same(whole, lab.one(other, lab.move(engine, session, other), seeded(12)))
        for kid in lab.fork(engine, session, 3, replay=True):
            same(whole, lab.one(engine, kid, seeded(12)))

    def test_a_capture_holds_the_window_and_the_last_two_states(self, engine: Engine, lab: Lab) -> None:
        captured = lab.capture(engine, lab.begin(engine, 600))
        assert [sorted(segment.blobs) for segment in captured.segments] == [["full"], ["full"], ["full", "sliding"]]
        assert captured.segments[-1].first == {"sliding": 600 - WINDOW}
        assert [[point.token for point in segment.points] for segment in captured.segments] == [[], [], [599, 600]]

    def test_a_cut_in_the_middle_of_generating_resumes_bit_for_bit(
        self, engine: Engine, other: Engine, lab: Lab
    ) -> None:
        captured, whole = lab.captured_amid(engine, lab.begin(engine, 250))
        assert captured.num_kv > 255
        same(whole, lab.resume(other, lab.hydrate(other, lab.plan(captured)).session)[0])

    def test_twenty_turns_write_their_own_tokens_window_and_states(
        self, engine: Engine, other: Engine, lab: Lab
    ) -> None:
        """And the last one goes on like its parent from the captures of all."""
        session, captures = lab.begin(engine, 250), []
        for turn in range(20):
            lab.one(engine, session, seeded(3), ids(4, 9 + turn))
            captures.append(lab.capture(engine, session, captures[-1].num_kv if captures else 0))
        assert [segment.start for c in captures[1:] for segment in c.segments][:2] == [256, 263]
        plan = lab.plan(captures[-1], *captures[:-1])
        same(lab.one(engine, session, seeded(8)), lab.one(other, lab.hydrate(other, plan).session, seeded(8)))


@pytest.mark.parametrize(
    ("groups", "interior", "asked", "at", "begins"),
    [
        ("one", True, (), 200, 199),
        ("one", True, (), 300, 299),
        ("latent", True, (), 200, 199),
        ("hybrid", True, (), 200, 199),
        ("hybrid", False, (128,), 200, 128),
        ("hybrid", False, (128,), 128, 0),
        ("states", False, (64, 128), 129, 128),
        ("windows", False, (128,), 200, 128),
        ("windows", False, (128, 150), 140, 139),
        ("windows", False, (), 300, 299),
        ("windows", False, (), 41, 0),
        ("one", True, (), 0, 0),
    ],
)
def test_reread_reads_what_it_must_and_no_more(
    groups: str, interior: bool, asked: tuple[int, ...], at: int, begins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes after the nearest earlier token that the session can be forked at; it goes on as the parent did."""
    monkeypatch.setitem(SHAPES, "windows", SHAPES["hybrid"][:2])
    with load_engine("fake", groups=groups, interior=interior) as engine:
        session = engine.open(seed=1)
        engine.keep_points(session, asked)
        engine.append(session, ids(300)).result()
        child = engine.reread(session, at).result()
        view, proof = engine.view(child), engine.view(child).proof
        assert proof is not None and (view.num_kv, view.tokens) == (at, ids(300)[:at])
        assert (proof.num_cached_tokens, proof.num_recomputed_tokens) == (begins, at - begins)
        fresh = engine.open(seed=1)
        engine.append(fresh, ids(300)[:at]).result()
        goes_on = [GenerateRequest(session=one, sampling=seeded(8), prompt=(5,)) for one in (child, fresh)]
        same(*(engine.generate([one]).result()[0] for one in goes_on))
