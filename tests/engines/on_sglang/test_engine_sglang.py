"""The law book on a real SGLang: a server of its own processes, reached over HTTP as any client reaches it."""

from __future__ import annotations

from pathlib import Path

import pytest

from guarded import GuardedTests
from thaw.engines import load_engine
from thaw.engines.base import Engine

pytest.importorskip("sglang")


class TestSglang(GuardedTests):
    @classmethod
    def boot(cls, model: Path, **changes: object) -> Engine:
        return load_engine("sglang", **{"model": str(model), "chunked_prefill_size": 512, **changes})
