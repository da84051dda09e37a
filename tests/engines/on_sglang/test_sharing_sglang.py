"""Sessions that shared slots of SGLang's pool share them after a restore, counted by SGLang's own allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sharing_laws import CHILDREN, NUM_TRUNK, READ, reads_all_where_the_session_beside_is_gone, shares_after_a_restore

pytest.importorskip("sglang")

import thaw
from thaw.engines.sglang.client.engine import SglangEngine


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path]) -> Iterator[SglangEngine]:
    model = str(tiny_model("llama", dtype="bfloat16", head_dim=64))
    options = {"dtype": "float32", "max_model_len": 1024, "max_total_tokens": 16_384}
    with thaw.load_engine("sglang", model=model, **options) as loaded:
        assert isinstance(loaded, SglangEngine)
        yield loaded


def used(engine: SglangEngine) -> int:
    stats = engine.stats()
    return stats["tokens"] - stats["free_tokens"]


@pytest.mark.parametrize("blindly", [False, True])
def test_slots_are_there_once(
    engine: SglangEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blindly: bool
) -> None:
    trunk = NUM_TRUNK - 1
    shares_after_a_restore(
        engine, tmp_path / "r", monkeypatch, blindly=blindly, empty=engine.flush_cache,
        counted=lambda sessions: used(engine) - len(sessions),  # the token that each was probed with
        expected=2 * trunk + CHILDREN * READ, apart=(CHILDREN + 2) * trunk + CHILDREN * READ,
    )  # fmt: skip


def test_a_session_beside_that_is_gone_is_not_needed(engine: SglangEngine, tmp_path: Path) -> None:
    reads_all_where_the_session_beside_is_gone(engine, tmp_path)
