"""kill -9 on vLLM's core and worker. A client that is killed while a server goes on is tested in test_operators.py."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.testing import KilledEngineTests
from thaw.testing.laws.killed_law import Lives

pytest.importorskip("vllm")

from thaw.engines.served.client.channel import worker_facts
from thaw.engines.vllm.client.engine import VllmEngine


class TestVllmKilled(KilledEngineTests):
    @pytest.fixture
    def boot(self, tiny_model: Callable[..., Path]) -> Callable[[], Engine]:
        model = tiny_model("llama", dtype="bfloat16", head_dim=64, num_hidden_layers=8, num_key_value_heads=4)
        self.left: list[Path] = []

        def boot() -> Engine:
            engine = load_engine("vllm", model=str(model), enforce_eager=True, max_model_len=4096)
            assert not [folder for folder in self.left if folder.exists()], "what dead engines left is swept at a boot"
            return engine

        return boot

    def processes(self, engine: Engine) -> dict[str, int]:
        assert isinstance(engine, VllmEngine)
        transport = engine._transport
        return {"worker": worker_facts(transport)[0].pid, "core": transport.facts.pid}

    def mail(self, engine: Engine) -> Path:
        assert isinstance(engine, VllmEngine)
        return engine._transport.mail.folder

    def died(self, engine: Engine) -> None:
        """What would be left where whoever started the engine was killed too and could not clean up."""
        mail = self.mail(engine)
        self.left.append(mail.with_name(f"{mail.name}-killed"))
        shutil.copytree(mail, self.left[-1])

    @pytest.mark.soak(
        "a boot for each of 25 kills",
        receipt="vllm-kills",
        covers=("src/thaw/engines/vllm", "src/thaw/engines/served", "src/thaw/data", "src/thaw/store"),
    )
    @pytest.mark.skipif(not os.environ.get("THAW_SOAK"), reason="set THAW_SOAK=1 (or `make soak`)")
    @pytest.mark.timeout(3 * 3600)
    def test_killed_25_times(self, lives: Lives, soak_receipt: Callable[..., None]) -> None:
        lives.run(25)
        soak_receipt(
            what="vLLM killed with kill -9 in the middle of a commit or a hydrate, 25 times",
            held="nothing half made was visible, a restarted engine went on from every acknowledged commit",
            counts=dict(sorted(lives.counts.items())),
        )
