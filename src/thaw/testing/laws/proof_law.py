"""Law 6, proof: what a restore returns is counted by the engine; a restore that did not hit is an error."""

from __future__ import annotations

import msgspec
import pytest

from thaw.core.cache import nbytes_at
from thaw.core.errors import CorruptBlob, NotHit
from thaw.engines.base import Engine
from thaw.testing.laws.kit import EngineKit, Lab, greedy, ids, kv_complete, run_again


class ProofLaw(EngineKit):
    def test_a_restore_says_what_was_cached(self, engine: Engine, other: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 300)
        captured = lab.capture(engine, session)
        plan = lab.plan(captured)
        hydrated = lab.hydrate(other, plan)
        proof = hydrated.proof
        num_kv = 300 - run_again(other)
        assert (proof.num_prompt_tokens, proof.num_cached_tokens, proof.matched) == (300, num_kv, num_kv)
        assert proof.hit and proof.first_mismatch is None and proof.num_recomputed_tokens == 0
        assert proof.nbytes >= nbytes_at(captured.identity.groups, num_kv)
        assert proof.verification in ("disk-verified", "arena-sealed", "device-verified")
        assert proof.continuation == other.info.continuation
        assert proof.stages_s and all(seconds >= 0 for seconds in proof.stages_s.values())
        view = other.view(hydrated.session)
        assert view.proof == proof and view.num_kv == num_kv

    def test_usage_counts_cached_and_prefilled_tokens(self, engine: Engine, other: Engine, lab: Lab) -> None:
        restored = lab.move(engine, lab.begin(engine, 300), other)
        out = lab.one(other, restored, greedy(3), (1, 2, 3, 4, 5))
        again = run_again(other)
        assert (out.num_cached_tokens, out.usage.num_prefilled_tokens) == (300 - again, 5 + again)
        assert (out.usage.num_prompt_tokens, out.usage.num_completion_tokens) == (305, 3)
        assert out.proof is not None and out.proof.hit

    def test_a_fresh_session_counts_every_token_as_prefilled(self, engine: Engine, lab: Lab) -> None:
        session = engine.open(seed=1)
        out = lab.one(engine, session, greedy(2), tuple(range(40)))
        assert (out.num_cached_tokens, out.usage.num_prefilled_tokens, out.usage.num_prompt_tokens) == (0, 40, 40)
        assert out.proof is None

    def test_a_session_finds_nothing_of_another_that_read_the_same_prompt(self, engine: Engine, lab: Lab) -> None:
        """Equal tokens, of another lineage: their KV may have other bits."""
        lab.begin(engine, 600)
        out = lab.one(engine, engine.open(seed=1), greedy(2), ids(600))
        assert (out.num_cached_tokens, out.usage.num_prefilled_tokens) == (0, 600)

    def test_a_fork_is_live_shared(self, engine: Engine, lab: Lab) -> None:
        child = lab.fork(engine, lab.begin(engine, 300))[0]
        view = engine.view(child)
        proof = view.proof
        assert proof is not None and proof.verification == "live-shared"
        assert proof.num_cached_tokens == view.num_kv and kv_complete(engine, view.num_kv, 300) and proof.hit

    def test_kv_that_is_not_there_is_an_error_and_not_a_slow_success(
        self, engine: Engine, other: Engine, lab: Lab
    ) -> None:
        plan = lab.plan(lab.capture(engine, lab.begin(engine, 600)))
        without_last = msgspec.structs.replace(plan, slices=plan.slices[:-1])
        without_first = msgspec.structs.replace(plan, slices=plan.slices[1:])
        too_much = msgspec.structs.replace(plan, num_kv=plan.num_kv + 1)
        for bad in (without_last, without_first, too_much):
            with pytest.raises((NotHit, CorruptBlob)):
                lab.hydrate(other, bad)
