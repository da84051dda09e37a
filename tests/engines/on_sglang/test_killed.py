"""kill -9 on SGLang's scheduler, which holds all KV, and on the server in front of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.engines.sglang.client.boot import OwnServerTransport
from thaw.engines.sglang.client.engine import SglangEngine
from thaw.testing import KilledEngineTests
from thaw.testing.laws.killed_law import Lives

pytest.importorskip("sglang")


class TestSglangKilled(KilledEngineTests):
    @pytest.fixture
    def boot(self, tiny_model: Callable[..., Path]) -> Callable[[], Engine]:
        model = tiny_model("llama", dtype="bfloat16", head_dim=64, num_hidden_layers=8, num_key_value_heads=4)
        return lambda: load_engine("sglang", model=str(model), max_model_len=4096)

    def processes(self, engine: Engine) -> dict[str, int]:
        transport = self.transport(engine)
        return {"scheduler": transport.facts.pid, "server": transport._server._process.pid}

    def mail(self, engine: Engine) -> Path:
        return self.transport(engine).mail.folder

    def transport(self, engine: Engine) -> OwnServerTransport:
        assert isinstance(engine, SglangEngine)
        transport = engine._transport
        assert isinstance(transport, OwnServerTransport)
        return transport

    @pytest.mark.soak(
        "a boot for each of 16 kills",
        receipt="sglang-kills",
        covers=("src/thaw/engines/sglang", "src/thaw/engines/served", "src/thaw/data", "src/thaw/store"),
    )
    @pytest.mark.skipif(not os.environ.get("THAW_SOAK"), reason="set THAW_SOAK=1 (or `make soak`)")
    @pytest.mark.timeout(3 * 3600)
    def test_killed_16_times(self, lives: Lives, soak_receipt: Callable[..., None]) -> None:
        lives.run(16)
        soak_receipt(
            what="SGLang killed with kill -9 in the middle of a commit or a hydrate, 16 times",
            held="nothing half made was visible, a restarted engine went on from every acknowledged commit",
            counts=dict(sorted(lives.counts.items())),
        )
