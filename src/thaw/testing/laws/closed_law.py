"""Law 5, fail closed: KV of other weights, layout or policy is refused, naming the field and both values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import pytest

from thaw.core.errors import (
    IdentityMismatch,
    InvalidRequest,
    NotKept,
    PolicyMismatch,
    Refused,
    StaleSession,
    ThawError,
    Unsupported,
)
from thaw.core.identity import ModelIdentity
from thaw.core.ids import digest
from thaw.engines.base import Engine, HydratePlan, SessionRef
from thaw.testing.laws.kit import LIMIT_S, EngineKit, Lab, Load, greedy, ids, replaced, running_policy, same, seeded
from thaw.testing.plans import mount_at

FOREIGN = digest(b"another")
FIELDS = ("architecture", "weights", "dtype", "config", "tokenizer", "adapter", "cache layout", "policy")


def mismatch(plan: HydratePlan, field: str) -> tuple[HydratePlan, str, str, str]:
    """(a plan that differs in `field` alone, the field's full name, the stored and the running value)."""
    identity = plan.identity
    if field == "config":
        name = sorted(identity.config)[0]
        stored = identity.config[name] + "0"
        return replaced(plan, config={**identity.config, name: stored}), f"config.{name}", stored, identity.config[name]
    if field == "cache layout":
        first, *others = identity.groups
        wider = msgspec.structs.replace(first, num_layers=first.num_layers + 1)
        return replaced(plan, groups=(wider, *others)), field, str(wider), str(first)
    value = {"architecture": "Other", "dtype": "float64", "policy": "other-policy"}.get(field, FOREIGN)
    return replaced(plan, **{field: value}), field, value, str(getattr(identity, field))


@dataclass(frozen=True)
class Changed:
    """An engine whose weights were changed after `session` had read 60 tokens and `plan` was made of it."""

    engine: Engine
    session: SessionRef
    plan: HydratePlan
    before: ModelIdentity


class ClosedLaw(EngineKit):
    @pytest.fixture(scope="class")
    @classmethod
    def changed(cls, engine_factory: Load, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Changed]:
        if not cls.changes_weights:
            pytest.skip("this class does not say how to change the engine's weights (change_weights)")
        lab = Lab(mount_at(tmp_path_factory.mktemp("changed")))
        with engine_factory() as engine:
            session = lab.begin(engine, 60)
            plan, before = lab.plan(lab.capture(engine, session)), engine.identity()
            cls().change_weights(engine)
            yield Changed(engine, session, plan, before)

    @pytest.mark.parametrize("field", FIELDS)
    def test_a_mismatch_is_refused_naming_the_field_and_both_values(
        self, engine: Engine, other: Engine, lab: Lab, field: str
    ) -> None:
        plan = lab.plan(lab.capture(engine, lab.begin(engine, 20)))
        lab.hydrate(other, plan)
        bad, name, stored, running = mismatch(plan, field)
        assert stored != running
        with pytest.raises(Refused) as refusal:
            lab.hydrate(other, bad)
        message = str(refusal.value)
        assert name in message and stored in message and running in message and "ecompute" in message
        if isinstance(refusal.value, IdentityMismatch):
            assert refusal.value.field == name
            assert stored in refusal.value.stored and running in refusal.value.running
        else:
            assert field == "policy" and isinstance(refusal.value, PolicyMismatch)

    def test_a_config_field_that_only_one_side_has_is_refused(self, engine: Engine, other: Engine, lab: Lab) -> None:
        plan = lab.plan(lab.capture(engine, lab.begin(engine, 20)))
        more = replaced(plan, config={**plan.identity.config, "zz_new": "1"})
        less = replaced(plan, config=dict(sorted(plan.identity.config.items())[1:]))
        for bad, field in ((more, "config.zz_new"), (less, f"config.{sorted(plan.identity.config)[0]}")):
            with pytest.raises(IdentityMismatch) as refusal:
                lab.hydrate(other, bad)
            assert refusal.value.field == field

    @pytest.mark.parametrize("field", [field for field in FIELDS if field != "tokenizer"])
    def test_recompute_happens_where_allowed_and_is_counted(
        self, engine: Engine, other: Engine, lab: Lab, field: str
    ) -> None:
        """The result is a plain prefill of the same tokens by this engine; nothing of the refused bytes is used."""
        session = lab.begin(engine, 300)
        plan = lab.plan(lab.capture(engine, session))
        bad = msgspec.structs.replace(mismatch(plan, field)[0], policy="recompute")
        hydrated = lab.hydrate(other, bad)
        proof = hydrated.proof
        assert (proof.num_recomputed_tokens, proof.num_cached_tokens, proof.matched) == (300, 0, 0)
        assert not proof.hit and proof.first_mismatch == 0 and proof.verification == "none" and proof.reason
        assert proof.continuation == "close"
        out = lab.one(other, hydrated.session, greedy(6))
        same(out, lab.one(engine, session, greedy(6)))
        assert out.proof == proof

    def test_recompute_is_not_used_where_loading_works(self, engine: Engine, other: Engine, lab: Lab) -> None:
        plan = lab.plan(lab.capture(engine, lab.begin(engine, 20)))
        proof = lab.hydrate(other, msgspec.structs.replace(plan, policy="recompute")).proof
        assert proof.hit and proof.num_recomputed_tokens == 0 and not proof.reason

    def test_a_point_that_was_not_kept_is_refused_or_recomputed(self, engine: Engine, other: Engine, lab: Lab) -> None:
        """Its plan names no KV. Without leave to recompute it is not a session that has none yet."""
        session = lab.begin(engine, 300)
        plan = lab.plan(lab.capture(engine, session))
        why = "no state was kept after 299 tokens"
        bare = msgspec.structs.replace(plan, num_kv=0, slices=(), points=(), boundary=None, hidden=None, not_kept=why)
        with pytest.raises(NotKept, match=why):
            lab.hydrate(other, bare)
        hydrated = lab.hydrate(other, msgspec.structs.replace(bare, policy="recompute"))
        proof = hydrated.proof
        assert (proof.num_recomputed_tokens, proof.num_cached_tokens, proof.matched) == (300, 0, 0)
        assert not proof.hit and proof.continuation == "close" and proof.reason == why
        same(lab.one(other, hydrated.session, greedy(6)), lab.one(engine, session, greedy(6)))

    def test_another_tokenizer_is_refused_even_with_recompute(self, engine: Engine, other: Engine, lab: Lab) -> None:
        """Tokens of another vocabulary mean other text: prefilling them again would be wrong too."""
        plan = lab.plan(lab.capture(engine, lab.begin(engine, 20)))
        bad = msgspec.structs.replace(mismatch(plan, "tokenizer")[0], policy="recompute")
        with pytest.raises(IdentityMismatch, match="tokenizer"):
            lab.hydrate(other, bad)

    def test_a_refused_hydrate_leaves_the_engine_working(self, engine: Engine, other: Engine, lab: Lab) -> None:
        plan = lab.plan(lab.capture(engine, lab.begin(engine, 20)))
        with pytest.raises(Refused):
            lab.hydrate(other, mismatch(plan, "weights")[0])
        assert lab.hydrate(other, plan).proof.hit

    def test_the_identity_is_the_same_in_two_engines_alike(self, engine: Engine, other: Engine) -> None:
        assert engine.identity() == other.identity()
        assert isinstance(engine.identity(), ModelIdentity)
        assert engine.identity().groups == engine.info.groups

    def test_kv_of_an_old_policy_is_refused_after_set_policy(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 30)
        plan = lab.plan(lab.capture(engine, session))
        with running_policy(engine, "step-2") as old:
            with pytest.raises(PolicyMismatch, match=rf"'{old}'.*'step-2'"):
                lab.hydrate(engine, plan)
            recomputed = lab.hydrate(engine, msgspec.structs.replace(plan, policy="recompute"))
            assert recomputed.proof.num_recomputed_tokens == 30
            fresh = lab.begin(engine, 30)
            assert lab.capture(engine, fresh).identity.policy == "step-2"
        assert plan.identity.policy == old == engine.identity().policy

    @pytest.mark.parametrize("parked", [False, True], ids=["resident", "parked"])
    @pytest.mark.parametrize("verb", ["append", "generate", "fork", "capture", "park"])
    def test_a_live_session_of_an_old_policy_is_stale(self, engine: Engine, lab: Lab, verb: str, parked: bool) -> None:
        """Its KV may not be mixed with, or passed on as, the new policy's; parked sessions are no exception."""
        session = lab.begin(engine, 30)
        if parked:
            engine.park(session).result(LIMIT_S)
        verbs: dict[str, Callable[[], object]] = {
            "append": lambda: engine.append(session, (1,)).result(LIMIT_S),
            "generate": lambda: lab.one(engine, session, greedy(2)),
            "fork": lambda: lab.fork(engine, session),
            "capture": lambda: lab.capture(engine, session),
            "park": lambda: engine.park(session).result(LIMIT_S),
        }
        with running_policy(engine, "step-2") as old:
            with pytest.raises(StaleSession, match=rf"'{old}'.*'step-2'"):
                verbs[verb]()
            assert engine.view(session).tokens == ids(30)

    @pytest.mark.parametrize("parked", [False, True], ids=["resident", "parked"])
    def test_what_a_stale_session_said_can_still_be_read(self, engine: Engine, lab: Lab, parked: bool) -> None:
        """Tokens, turns with text and log probabilities, seed: a rollout is exported after the step that ended it. Its
        children, too, and each as often as one likes."""
        session = lab.begin(engine, 30)
        lab.one(engine, session, seeded(8, logprobs=2), ids(3, 4))
        child = lab.fork(engine, session, at=36)[0]
        if parked:
            engine.park(session).result(LIMIT_S)
        before = [engine.view(one) for one in (session, child)]
        assert [turn.kind for turn in before[0].turns] == ["prompt", "prompt", "completion"]
        with running_policy(engine, "step-2"):
            for _ in range(2):
                with pytest.raises(StaleSession, match="can still be read"):
                    lab.fork(engine, session)
                assert [engine.view(one) for one in (session, child)] == before
            engine.close_session(session)
            assert engine.view(child) == before[1]

    def test_kv_is_kept_over_a_policy_step_only_where_that_is_asked_for(self, engine: Engine, lab: Lab) -> None:
        """And the ranges say which policy computed it, in forks and captures too. An engine that cannot keep it refuses
        by name, and nothing changes."""
        asked, other = lab.begin(engine, 30), lab.begin(engine, 30)
        plan = msgspec.structs.replace(lab.plan(lab.capture(engine, other)), stale_kv=True)
        if "stale-kv" not in engine.info.capabilities:
            with pytest.raises(Unsupported, match=r"stale_kv|recurrent"):
                engine.keep_stale_kv(asked)
            with pytest.raises(Unsupported, match="stale_kv"):
                lab.hydrate(engine, plan)
            assert lab.one(engine, asked, greedy(2)).token_ids == lab.one(engine, other, greedy(2)).token_ids
            return
        engine.keep_stale_kv(asked)
        with running_policy(engine, "step-2") as old:
            lab.one(engine, asked, greedy(4), ids(3, 30))
            assert [one.policy for one in engine.view(asked).kv_ranges] == [old, "step-2"]
            with pytest.raises(StaleSession):
                lab.one(engine, other, greedy(4), ids(3, 30))
            captured = lab.capture(engine, asked)
            assert captured.kv_ranges[0].policy == old and captured.kv_ranges[-1].end == captured.num_kv
            with pytest.raises(PolicyMismatch, match=rf"{old!r}"):
                lab.hydrate(engine, lab.plan(captured))
            same_again = lab.hydrate(engine, msgspec.structs.replace(lab.plan(captured), stale_kv=True))
            assert same_again.proof.kv_ranges[0].policy == old
            (child,) = lab.fork(engine, asked)
            with pytest.raises(StaleSession, match="nobody asked"):
                lab.one(engine, child, greedy(2))
            same(lab.one(engine, same_again.session, greedy(6)), lab.one(engine, asked, greedy(6)))

    def test_what_a_session_said_can_be_read_after_its_weights_changed(self, changed: Changed) -> None:
        assert changed.engine.view(changed.session).tokens == changed.plan.tokens
        assert changed.engine.view(changed.session).turns == changed.plan.turns

    def test_a_completion_of_another_policy_is_not_resumed(self, engine: Engine, lab: Lab) -> None:
        """Its tokens would be of no one policy, and no name for them right. Another completion may follow it."""
        session = lab.begin(engine, 30)
        lab.one(engine, session, seeded(8))
        plan = lab.plan(lab.capture(engine, lab.twin(engine, session, at=35)))
        with running_policy(engine, "step-2") as old:
            recomputed = lab.hydrate(engine, msgspec.structs.replace(plan, policy="recompute")).session
            with pytest.raises(PolicyMismatch, match=rf"'{old}'.*'step-2'"):
                lab.resume(engine, recomputed)
            assert len(lab.one(engine, recomputed, greedy(2)).token_ids) == 2
            turns = engine.view(recomputed).turns
            assert [(t.kind, t.policy, t.end - t.start) for t in turns[1:]] == [
                ("completion", old, 5), ("completion", "step-2", 2),
            ]  # fmt: skip

    def test_set_policy_back_makes_old_kv_good_again(self, engine: Engine, lab: Lab) -> None:
        plan = lab.plan(lab.capture(engine, lab.begin(engine, 30)))
        with running_policy(engine, "1"), pytest.raises(PolicyMismatch):
            lab.hydrate(engine, plan)
        assert lab.hydrate(engine, plan).proof.hit

    def test_with_policy_gives_the_former_version_back(self, engine: Engine, lab: Lab) -> None:
        """Nested, and when the body raises; sessions on either side keep to their own version."""
        former, outside, empty = engine.policy_version, lab.begin(engine, 30), engine.open(seed=1)
        expected = lab.one(engine, lab.twin(engine, outside), seeded(6))
        assert engine.identity().policy == former
        with pytest.raises(ZeroDivisionError), engine.policy(version="step-2"):
            assert engine.policy_version == engine.identity().policy == "step-2"
            inside = lab.begin(engine, 30)
            with engine.policy(version="step-3"):
                for session in (outside, inside):
                    with pytest.raises(StaleSession, match="'step-3'"):
                        lab.fork(engine, session)
            assert engine.policy_version == engine.identity().policy == "step-2"
            lab.fork(engine, inside)
            assert lab.capture(engine, empty).identity.policy == "step-2"
            raise ZeroDivisionError
        assert engine.policy_version == engine.identity().policy == former
        with pytest.raises(StaleSession, match=rf"'step-2'.*'{former}'"):
            lab.fork(engine, inside)
        same(expected, lab.one(engine, outside, seeded(6)))
        assert len(lab.one(engine, empty, greedy(2), ids(5)).token_ids) == 2

    def test_with_the_policy_that_runs_nothing_is_stale(self, engine: Engine, lab: Lab) -> None:
        outside = lab.begin(engine, 30)
        with engine.policy(version=engine.policy_version):
            inside = lab.fork(engine, outside)[0]
        assert len(lab.one(engine, inside, greedy(2)).token_ids) == 2

    def test_a_policy_that_is_no_version_changes_nothing(self, engine: Engine) -> None:
        former = engine.policy_version
        with pytest.raises(InvalidRequest, match="policy version ''"), engine.policy(version=""):
            raise AssertionError("the body must not run")
        assert engine.policy_version == engine.identity().policy == former

    def test_weights_changed_in_place_are_noticed(self, changed: Changed, lab: Lab) -> None:
        with pytest.raises(StaleSession):
            lab.one(changed.engine, changed.session, greedy(2))
        with pytest.raises(IdentityMismatch) as refusal:
            lab.hydrate(changed.engine, changed.plan)
        assert refusal.value.field == "weights"
        running = changed.engine.identity()
        assert (refusal.value.stored, refusal.value.running) == (changed.before.weights, running.weights)

    def test_updated_weights_run_and_kv_of_the_former_is_refused(self, changed: Changed, lab: Lab) -> None:
        engine = changed.engine
        session, former = lab.begin(engine, 40), engine.identity()
        right = lab.one(engine, lab.begin(engine, 60), greedy(6))
        try:
            engine.update_weights(self.own_weights(engine))
            assert engine.identity().weights != former.weights
            assert engine.policy_version == former.policy
            with pytest.raises(StaleSession):
                lab.one(engine, session, greedy(2))
            assert lab.one(engine, lab.begin(engine, 60), greedy(6)).token_ids != right.token_ids
        finally:
            self.change_weights(engine)
        same(right, lab.one(engine, lab.begin(engine, 60), greedy(6)))

    def test_weights_that_are_none_are_refused_and_what_ran_runs_on(self, changed: Changed, lab: Lab) -> None:
        engine, before = changed.engine, changed.engine.identity()
        with pytest.raises(ThawError):
            engine.update_weights("/nowhere/at/all")
        assert engine.identity() == before
        assert len(lab.one(engine, lab.begin(engine, 10), greedy(2)).token_ids) == 2

    def test_without_the_guard_changed_weights_would_give_wrong_tokens(
        self, changed: Changed, load: Load, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What the guard is for: old KV under new weights is neither model's continuation."""
        right = lab.one(changed.engine, lab.begin(changed.engine, 60), greedy(12))
        engine = load()
        session = lab.begin(engine, 60)
        plan = lab.plan(lab.capture(engine, session))
        old = lab.one(engine, session, greedy(12))
        self.guard_off(engine, monkeypatch)
        self.change_weights(engine)
        mixed = lab.one(engine, lab.hydrate(engine, plan).session, greedy(12))
        assert mixed.token_ids != right.token_ids
        assert mixed.token_ids != old.token_ids, "the weights did not change"
