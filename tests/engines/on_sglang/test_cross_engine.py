"""Snapshots cross engines: KV of transformers goes on in SGLang and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import thaw
from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.testing import CrossingTests
from thaw.testing.laws.kit import greedy, ids

pytest.importorskip("sglang")


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", dtype="bfloat16", head_dim=64)


class TestSglangAndTransformers(CrossingTests):
    @pytest.fixture(scope="class")
    @classmethod
    def here(cls, folder: Path) -> Iterator[Engine]:
        with load_engine("transformers", model=str(folder)) as engine:
            yield engine

    @pytest.fixture(scope="class")
    @classmethod
    def there(cls, folder: Path) -> Iterator[Engine]:
        with load_engine("sglang", model=str(folder), max_model_len=2048) as engine:
            yield engine

    def test_verify_says_whether_a_commit_of_the_other_engine_holds_here(
        self, here: Engine, there: Engine, tmp_path: Path
    ) -> None:
        """The logits that transformers stored were never promised of SGLang: they are measured."""
        with thaw.open(tmp_path / "repo", engine=here, create=True) as repo:
            session = repo.session(seed=3)
            session.append(token_ids=ids(300))
            session.generate(sampling=greedy(6))
            session.commit("asked", branch="main")
            at_home = {law.name: law for law in repo.verify("main", fresh_process=False).laws}
        with thaw.open(tmp_path / "repo", engine=there) as repo:
            report = repo.verify("main", fresh_process=False)
        laws = {law.name: law for law in report.laws}
        assert report.ok and report.engine == "sglang"
        assert all(laws[name].held for name in ("bytes", "identity", "cached", "state"))
        assert at_home["boundary"].held and "bit for bit" in at_home["boundary"].promised
        assert laws["boundary"].held is None and "are of transformers" in laws["boundary"].promised
        assert float(laws["boundary"].seen.split()[-1]) < self.tolerance
