"""Snapshots cross engines: KV of transformers goes on in SGLang and back, byte for byte; numbers are the receiver's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import thaw
from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.testing.laws.bytes_law import blob_ids
from thaw.testing.laws.kit import Lab, greedy, ids
from thaw.testing.plans import halves_swapped, mount_at, tampered

pytest.importorskip("sglang")

TOLERANCE = 0.25
"""Largest difference of a log probability between two engines' kernels in bf16 on a random model that looks at its KV.
Wrong KV moves them by more (the control below)."""


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", dtype="bfloat16", head_dim=64)


@pytest.fixture(scope="module")
def sglang(folder: Path) -> Iterator[Engine]:
    with load_engine("sglang", model=str(folder), max_model_len=2048) as engine:
        yield engine


@pytest.fixture(scope="module")
def transformers(folder: Path) -> Iterator[Engine]:
    with load_engine("transformers", model=str(folder)) as engine:
        yield engine


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


def test_the_identity_is_the_same(sglang: Engine, transformers: Engine) -> None:
    assert sglang.identity() == transformers.identity()


@pytest.mark.parametrize("way", ["transformers to sglang", "sglang to transformers"])
def test_bytes_are_equal_and_the_logprobs_close(sglang: Engine, transformers: Engine, lab: Lab, way: str) -> None:
    giver, taker = (transformers, sglang) if way.startswith("transformers") else (sglang, transformers)
    session = lab.begin(giver, 700)
    plan = lab.plan(lab.capture(giver, session), at=700)
    hydrated = lab.hydrate(taker, plan)
    assert hydrated.proof.hit and hydrated.proof.num_cached_tokens == plan.num_kv
    here, there = lab.capture(giver, lab.twin(giver, session, at=699)), lab.capture(taker, hydrated.session)
    count = min(len(blob_ids(here)), len(blob_ids(there))) - 1
    assert count == 2 and blob_ids(here)[:count] == blob_ids(there)[:count]
    own = lab.one(giver, lab.twin(giver, session, at=700), greedy(1, logprobs=5))
    other = lab.one(taker, hydrated.session, greedy(1, logprobs=5))
    assert own.top_logprobs is not None and other.top_logprobs is not None
    mine, theirs = dict(own.top_logprobs[0]), dict(other.top_logprobs[0])
    both = mine.keys() & theirs.keys()
    difference = max(abs(mine[token] - theirs[token]) for token in both)
    print(f"{way}: largest difference of {len(both)} log probabilities {difference:.4f}")
    assert len(both) >= 3 and difference < TOLERANCE


def test_negative_control_wrong_kv_is_not_close(sglang: Engine, transformers: Engine, lab: Lab) -> None:
    session = lab.begin(transformers, 700)
    plan = lab.plan(lab.capture(transformers, session), at=700)
    wrong_plan = tampered(plan, halves_swapped)
    right = lab.one(sglang, lab.hydrate(sglang, plan).session, greedy(1, logprobs=20)).top_logprobs
    wrong = lab.one(sglang, lab.hydrate(sglang, wrong_plan).session, greedy(1, logprobs=20)).top_logprobs
    assert right is not None and wrong is not None
    both = dict(right[0]).keys() & dict(wrong[0]).keys()
    assert max((abs(dict(right[0])[t] - dict(wrong[0])[t]) for t in both), default=1.0) > TOLERANCE


def test_verify_says_whether_a_commit_of_the_other_engine_holds_here(
    sglang: Engine, transformers: Engine, tmp_path: Path
) -> None:
    """The logits that transformers stored were never promised of SGLang: they are measured."""
    with thaw.open(tmp_path / "repo", engine=transformers, create=True) as repo:
        session = repo.session(seed=3)
        session.append(token_ids=ids(300))
        session.generate(sampling=greedy(6))
        session.commit("asked", branch="main")
        at_home = {law.name: law for law in repo.verify("main", fresh_process=False).laws}
    with thaw.open(tmp_path / "repo", engine=sglang) as repo:
        report = repo.verify("main", fresh_process=False)
    there = {law.name: law for law in report.laws}
    assert report.ok and report.engine == "sglang"
    assert all(there[name].held for name in ("bytes", "identity", "cached", "state"))
    assert at_home["boundary"].held and "bit for bit" in at_home["boundary"].promised
    assert there["boundary"].held is None and "are of transformers" in there["boundary"].promised
    assert float(there["boundary"].seen.split()[-1]) < TOLERANCE
