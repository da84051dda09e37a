"""An engine that its owner has paused makes no step, so nothing can be captured from it: a drain names every session
when its time is over, loses nothing, and the sessions go on once the engine is resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import thaw
from thaw import Sampling
from thaw.engines.base import Engine
from thaw.repo.admission import Drained

OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024}
LONG = Sampling(temperature=0.8, max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    model = tiny_model("llama", dtype="bfloat16", head_dim=64)
    with thaw.load_engine("vllm", model=str(model), **OPTIONS) as running:
        yield running


def owned(engine: Any) -> Any:
    """vLLM's own engine, as whoever has handed it to thaw would use it, and how to await its verbs."""
    transport, loop = engine._transport, engine._loop
    return transport._llm, loop


@pytest.mark.soak(
    "boots an engine and waits for what does not come",
    receipt="vllm-drain-while-paused",
    covers=("src/thaw/repo", "src/thaw/engines/vllm", "src/thaw/engines/served"),
)
def test_a_drain_of_a_paused_engine_names_every_session_and_loses_nothing(engine: Engine, tmp_path: Path) -> None:
    llm, loop = owned(engine)
    with thaw.open(tmp_path / "whole", engine=engine) as repo:
        session = repo.session(seed=3)
        session.append("The river is long.")
        whole = session.generate("", LONG).token_ids
    with thaw.open(tmp_path / "r", engine=engine) as repo:
        idle, running = repo.session(seed=3), repo.session(seed=3)
        idle.append("The river is long.")
        running.append("The river is long.")
        stream = running.stream("", LONG)
        next(iter(stream))
        loop.wait(llm.pause_generation(mode="keep", clear_cache=False))
        assert loop.wait(llm.is_paused())
        report = repo.drain(timeout_s=3.0)
        assert len(report.missed) == 2 and report.points == () and report.seconds < 6.0
        assert all("not captured within 3 s" in one.why for one in report.missed)
        loop.wait(llm.resume_generation())
        repo.undrain()
        with pytest.raises(Drained):
            stream.result(60)
        assert repo.drain(timeout_s=60.0).missed == ()
        repo.undrain()
        assert idle.generate("", LONG).token_ids == whole
        assert running.resume().token_ids == whole
