"""Sessions that shared blocks of vLLM share them after a restore, counted by vLLM's own blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from sharing_laws import (
    CHILDREN,
    NUM_TRUNK,
    READ,
    held,
    reads_all_where_the_session_beside_is_gone,
    shares_after_a_restore,
)

pytest.importorskip("vllm")

import thaw
from thaw.core.errors import InvalidRequest
from thaw.engines.served.client import hydrating
from thaw.engines.vllm.client.engine import VllmEngine
from thaw.testing.laws.kit import Lab, greedy, same
from thaw.testing.plans import mount_at

BLOCK = 32


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path]) -> Iterator[VllmEngine]:
    model = str(tiny_model("llama", dtype="bfloat16", head_dim=64))
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "block_size": BLOCK}
    with thaw.load_engine("vllm", model=model, **options) as loaded:
        assert isinstance(loaded, VllmEngine)
        yield loaded


@pytest.mark.parametrize("blindly", [False, True])
def test_full_blocks_are_there_once(
    engine: VllmEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blindly: bool
) -> None:
    trunk, child = (NUM_TRUNK - 1) // BLOCK, (NUM_TRUNK - 1 + READ) // BLOCK
    shares_after_a_restore(
        engine, tmp_path / "r", monkeypatch, blindly=blindly, empty=lambda: None,
        counted=lambda sessions: held(engine, sessions, BLOCK, lambda stats: -stats["free_blocks"]),
        expected=2 * trunk + CHILDREN * (child - trunk), apart=2 * trunk + CHILDREN * child,
    )  # fmt: skip


def test_from_a_session_beside_it_takes_no_other_tokens(
    engine: VllmEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the client says that both have. The control: what they do have is shared, and not read."""
    lab = Lab(mount_at(tmp_path / "packs"))
    plans = [lab.plan(lab.capture(engine, lab.begin(engine, 300, start=start))) for start in (1, 2)]
    other = lab.hydrate(engine, plans[0]).session
    twin = lab.hydrate(engine, msgspec.structs.replace(plans[0], beside=other))
    assert twin.proof.nbytes == 0 and twin.proof.num_cached_tokens == plans[0].num_kv
    same(lab.one(engine, other, greedy(4)), lab.one(engine, twin.session, greedy(4)))
    apart = msgspec.structs.replace(plans[1], beside=other)
    assert lab.hydrate(engine, apart).proof.nbytes > 0
    monkeypatch.setattr(hydrating.restoring, "num_shared", lambda *_: 64)
    with pytest.raises(InvalidRequest, match="other tokens than the plan's first 64"):
        lab.hydrate(engine, apart)


def test_a_session_beside_that_is_gone_is_not_needed(engine: VllmEngine, tmp_path: Path) -> None:
    reads_all_where_the_session_beside_is_gone(engine, tmp_path)
