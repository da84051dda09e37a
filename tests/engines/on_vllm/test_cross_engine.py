"""Snapshots cross engines: KV of transformers goes on in vLLM and back, byte for byte; numerics are the receiver's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.testing.laws.bytes_law import blob_ids
from thaw.testing.laws.kit import Lab, greedy, ids
from thaw.testing.plans import halves_swapped, mount_at, tampered

pytest.importorskip("vllm")

TOLERANCE = 0.25
"""Largest difference of a log probability between two engines' kernels in bf16 on a random model that looks at its KV.
Measured: under 0.1. Wrong KV moves them by more (the control below)."""


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", dtype="bfloat16", head_dim=64)


@pytest.fixture(scope="module")
def vllm(folder: Path) -> Iterator[Engine]:
    with load_engine("vllm", model=str(folder), enforce_eager=True, max_model_len=2048) as engine:
        yield engine


@pytest.fixture(scope="module")
def transformers(folder: Path) -> Iterator[Engine]:
    with load_engine("transformers", model=str(folder)) as engine:
        yield engine


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


def test_the_identity_is_the_same(vllm: Engine, transformers: Engine) -> None:
    assert vllm.identity() == transformers.identity()


@pytest.mark.parametrize("way", ["transformers to vllm", "vllm to transformers"])
def test_bytes_are_equal_and_the_logprobs_close(vllm: Engine, transformers: Engine, lab: Lab, way: str) -> None:
    giver, taker = (transformers, vllm) if way.startswith("transformers") else (vllm, transformers)
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


def test_negative_control_wrong_kv_is_not_close(vllm: Engine, transformers: Engine, lab: Lab) -> None:
    session = lab.begin(transformers, 700)
    plan = lab.plan(lab.capture(transformers, session), at=700)
    right = lab.one(vllm, lab.hydrate(vllm, plan).session, greedy(1, logprobs=20)).top_logprobs
    wrong = lab.one(
        vllm, lab.hydrate(vllm, tampered(plan, halves_swapped)).session, greedy(1, logprobs=20)
    ).top_logprobs
    assert right is not None and wrong is not None
    both = dict(right[0]).keys() & dict(wrong[0]).keys()
    assert max((abs(dict(right[0])[t] - dict(wrong[0])[t]) for t in both), default=1.0) > TOLERANCE
    assert lab.one(vllm, lab.begin(vllm, 300, start=2), greedy(2), ids(3)).token_ids
