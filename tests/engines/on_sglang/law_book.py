"""The whole law book on `sglang.Engine`s of the program's own. test_engine_object.py runs this file in a process of its
own: SGLang's signal handlers, and what it does when it fails, are the whole program's."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import thaw
from guarded import GuardedTests
from thaw.engines.base import Engine
from thaw.engines.sglang.client.boot import KEPT_BACK
from thaw.engines.sglang.client.engine import SglangEngine
from thaw.engines.sglang.client.engine_object import EngineObjectTransport
from thaw.engines.sglang.settings import BACKEND, ON_CPU


class TestSglangInProcess(GuardedTests):
    @classmethod
    def boot(cls, model: Path, *, policy: str = "0", max_model_len: int | None = None) -> Engine:  # type: ignore[override]
        length = {} if max_model_len is None else {"context_length": max_model_len + KEPT_BACK}
        return begun(policy, model_path=str(model), **length)

    def test_it_is_in_process(self, engine: Engine) -> None:
        assert isinstance(engine, SglangEngine)
        assert isinstance(engine._transport, EngineObjectTransport)


def begun(policy: str, **options: Any) -> Engine:
    """thaw on a new `sglang.Engine`, whose processes end with it. `shutdown` would end those of the others too."""
    import sglang

    others = set(multiprocessing.active_children())
    sgl = sglang.Engine(radix_cache_backend=BACKEND, chunked_prefill_size=512, **ON_CPU, **options)
    processes = set(multiprocessing.active_children()) - others
    engine = thaw.attach(sgl, policy=policy)
    leave = engine.close

    def close() -> None:
        leave()
        sgl.tokenizer_manager._subprocess_watchdog.stop()  # it takes their end for a failure
        for process in processes:
            process.kill()

    engine.close = close  # type: ignore[method-assign]
    return engine
