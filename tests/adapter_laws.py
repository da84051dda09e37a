"""Laws of sessions under LoRA adapters, for every engine that runs them. The adapter is a random one that moves log
probabilities clearly, and so would the KV of the model alone under it (the control)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

import thaw
from thaw.core.errors import IdentityMismatch, InvalidRequest, NotFound
from thaw.core.ids import is_id
from thaw.engines.base import Completion, Engine, HydratePlan, SessionRef
from thaw.testing.laws.kit import LIMIT_S, Lab, greedy, ids, same, seeded
from thaw.testing.models import make_random_adapter

CLOSE, FAR = 0.02, 0.2
"""Log probabilities where the same tokens were read in another shape, and where other KV was read."""


class Adapters(NamedTuple):
    """Folders: two of the same content, and one of another."""

    one: Path
    twin: Path
    other: Path


def made_adapters(model: Path, root: Path) -> Adapters:
    one = make_random_adapter(model, root / "one", seed=1)
    twin = Path(shutil.copytree(one, root / "twin"))
    return Adapters(one, twin, make_random_adapter(model, root / "other", seed=2))


def named(folders: Adapters) -> dict[str, str]:
    """As the engine of these laws calls them."""
    return {"law": str(folders.one), "law-again": str(folders.twin), "code": str(folders.other)}


def begun(engine: Engine, adapter: str | None, count: int = 300, **how: Any) -> SessionRef:
    session = engine.open(seed=5, adapter=adapter, **how)
    engine.append(session, ids(count)).result(LIMIT_S)
    return session


def far(one: Completion, two: Completion) -> bool:
    """Whether they were computed from other KV: other tokens, or log probabilities far apart."""
    pairs = zip(one.logprobs, two.logprobs, strict=True)
    return one.token_ids != two.token_ids or max(abs(a - b) for a, b in pairs) > FAR


def close(one: Completion, two: Completion) -> bool:
    pairs = zip(one.logprobs, two.logprobs, strict=True)
    return one.token_ids == two.token_ids and max(abs(a - b) for a, b in pairs) < CLOSE


def as_if(plan: HydratePlan, adapter: str | None) -> HydratePlan:
    return msgspec.structs.replace(plan, identity=msgspec.structs.replace(plan.identity, adapter=adapter))


class AdapterLaws:
    """`engine` has the adapters of `named(folders)`."""

    def test_an_adapters_identity_is_its_content_and_the_models_own_is_as_before(
        self, engine: Engine, folders: Adapters
    ) -> None:
        found = engine.adapters()
        assert found.keys() >= named(folders).keys() and "adapters" in engine.info.capabilities
        assert found["law"] == found["law-again"] != found["code"] and is_id(found["law"])
        alone, under = engine.identity(), engine.identity("law")
        assert alone.adapter is None and under.adapter == found["law"]
        assert msgspec.structs.replace(under, adapter=None) == alone
        assert engine.identity(found["law"]) == engine.identity("law-again") == under

    def test_each_runs_under_its_own_and_reads_nobody_elses_kv(self, engine: Engine, lab: Lab) -> None:
        """In one batch, with the same tokens, also where all share their prefixes; a fork and a later turn too."""
        names = (None, "law", "code")
        first = [lab.one(engine, begun(engine, name), greedy(12)) for name in names]
        assert far(first[0], first[1]) and far(first[0], first[2]) and far(first[1], first[2])
        for how in ({}, {"share_prefix": True, "salt": "everybody"}):
            sessions = [begun(engine, name, **how) for name in names]
            alone = [lab.one(engine, lab.twin(engine, session), greedy(12)) for session in sessions]
            assert all(close(one, two) for one, two in zip(first, alone, strict=True))
            for two, other in (("law", 0), ("code", 1), (None, 2)):
                again = begun(engine, two, **how)
                assert far(lab.one(engine, again, greedy(12)), alone[other])

    def test_stored_under_an_adapter_it_goes_on_bit_for_bit(self, engine: Engine, lab: Lab) -> None:
        """And the control: the KV of the model alone, if it were taken for the adapter's, is seen."""
        session = begun(engine, "law")
        captured = lab.capture(engine, session)
        assert captured.identity.adapter == engine.adapters()["law"]
        moved = lab.hydrate(engine, lab.plan(captured)).session
        assert engine.view(moved).adapter == captured.identity.adapter
        same(
            lab.one(engine, lab.twin(engine, session), seeded(16)), lab.one(engine, lab.twin(engine, moved), seeded(16))
        )
        whole = lab.one(engine, lab.twin(engine, session), greedy(12))
        alone = lab.plan(lab.capture(engine, begun(engine, None)))
        forged = lab.hydrate(engine, as_if(alone, captured.identity.adapter)).session
        assert far(lab.one(engine, forged, greedy(12)), whole)

    def test_a_restored_session_goes_on_under_any_name_of_its_adapter_alone(self, engine: Engine, lab: Lab) -> None:
        plan = lab.plan(lab.capture(engine, begun(engine, "law")))
        expected = lab.one(engine, lab.hydrate(engine, plan).session, greedy(8))
        again = msgspec.structs.replace(plan, adapter="law-again")
        same(expected, lab.one(engine, lab.hydrate(engine, again).session, greedy(8)))
        for wanted, says in (("code", engine.adapters()["code"]), ("", "None")):
            with pytest.raises(IdentityMismatch, match=rf"adapter {plan.identity.adapter}; this engine runs {says}"):
                lab.hydrate(engine, msgspec.structs.replace(plan, adapter=wanted))
        alone = lab.plan(lab.capture(engine, begun(engine, None)))
        with pytest.raises(IdentityMismatch, match=r"adapter None; this engine runs b3:"):
            lab.hydrate(engine, msgspec.structs.replace(alone, adapter="law"))
        gone = as_if(plan, "b3:" + "0" * 64)
        with pytest.raises(IdentityMismatch, match=r"adapter b3:000.*; this engine runs None"):
            lab.hydrate(engine, gone)
        for wanted in ("nobody", gone.identity.adapter or ""):
            with pytest.raises(NotFound, match=r"no adapter .*'law'"):
                engine.open(adapter=wanted)

    def test_recomputed_under_another_adapter_only_where_that_was_asked_for(self, engine: Engine, lab: Lab) -> None:
        plan = lab.plan(lab.capture(engine, begun(engine, "law")))
        asked = msgspec.structs.replace(plan, adapter="code", policy="recompute")
        found = lab.hydrate(engine, asked)
        assert found.proof.num_recomputed_tokens == 300 and found.proof.num_cached_tokens == 0
        assert close(lab.one(engine, found.session, greedy(8)), lab.one(engine, begun(engine, "code"), greedy(8)))

    def test_children_run_under_the_parents_adapter_also_mixed_in_one_batch(self, engine: Engine, lab: Lab) -> None:
        parents = [begun(engine, name) for name in (None, "law", "code")]
        children = [lab.fork(engine, parent, 2, replay=True) for parent in parents]
        expected = [lab.one(engine, pair[0], greedy(8)) for pair in children]
        for done, one in zip(
            lab.run(engine, *(pair[1] for pair in children), sampling=greedy(8)), expected, strict=True
        ):
            assert close(done, one) and done.num_cached_tokens == 299

    def test_commits_match_and_continue_by_their_adapter(self, engine: Engine, tmp_path: Path) -> None:
        with thaw.init(tmp_path / "runs", engine=engine) as repo:
            session = repo.session(adapter="law", seed=1)
            session.append("The same words for all. " * 25)
            first = session.commit("under it", branch="main")
            tokens = engine.view(session.ref).tokens
            assert repo.match(tokens) is None and repo.match(tokens, adapter="code") is None
            found = repo.match(tokens, adapter="law-again")
            assert found is not None and found.num_tokens == len(tokens)
            kids = repo.fork("main", 2)
            assert all(engine.view(kid.ref).adapter == engine.adapters()["law"] for kid in kids)
            assert repo.session("main", adapter="law-again").num_tokens == len(tokens)
            with pytest.raises(IdentityMismatch, match="adapter"):
                repo.session("main", adapter="")
            report = repo.verify("main", num_tokens=4, fresh_process=False)
            assert report.ok, report
            session.generate("More?", greedy(4))
            assert session.commit("more", branch="main").nbytes_written < first.nbytes_written / 2

    def test_reloaded_with_other_content_it_is_another_identity(
        self, engine: Engine, lab: Lab, tmp_path: Path, model: Path
    ) -> None:
        """The first content stays with its sessions, whatever becomes of its folder and its name."""
        folder = make_random_adapter(model, tmp_path / "moving", seed=7)
        first = engine.load_adapter("moving", folder)
        session = begun(engine, "moving")
        expected = lab.one(engine, lab.twin(engine, session), greedy(8))
        make_random_adapter(model, folder, seed=8)
        second = engine.load_adapter(*self.reloaded(folder))
        assert second != first
        fresh = begun(engine, second)
        assert far(lab.one(engine, fresh, greedy(8)), expected)
        self.first_goes_on(engine, lab, session, expected)

    def reloaded(self, folder: Path) -> tuple[str, Path]:
        """The name and the folder under which changed weights are loaded."""
        return "moving", folder

    def first_goes_on(self, engine: Engine, lab: Lab, session: SessionRef, expected: Completion) -> None:
        same(expected, lab.one(engine, lab.twin(engine, session), greedy(8)))

    def test_what_is_no_adapter_is_refused_by_name(self, engine: Engine, tmp_path: Path) -> None:
        with pytest.raises(NotFound, match="no adapter in"):
            engine.load_adapter("x", tmp_path)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
        with pytest.raises(thaw.ThawError, match=r"no adapter_model\.safetensors"):
            engine.load_adapter("x", tmp_path)
        with pytest.raises(InvalidRequest, match="adapter name"):
            engine.load_adapter("", tmp_path)
