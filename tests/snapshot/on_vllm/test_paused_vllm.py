"""An engine that its owner has paused makes no step for requests, but one for captures: a drain of it has every
session and computes nothing, and the sessions go on once the engine is resumed."""

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
    "boots an engine",
    receipt="vllm-drain-while-paused",
    covers=("src/thaw/repo", "src/thaw/engines/vllm", "src/thaw/engines/served"),
)
@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_a_drain_of_a_paused_engine_has_every_session_and_loses_nothing(
    engine: Engine, tmp_path: Path, mode: str
) -> None:
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
        loop.wait(llm.pause_generation(mode=mode, clear_cache=False))
        assert loop.wait(llm.is_paused()) and engine.stalled() == ""
        llm.vllm_config.model_config.enable_sleep_mode = True  # as this side would know it of an engine that may sleep
        assert "paused this vLLM or put it to sleep" in engine.stalled()
        llm.vllm_config.model_config.enable_sleep_mode = False
        report = repo.drain(timeout_s=30.0)
        assert report.missed == () and report.seconds < 15.0
        points = {one.session: one for one in report.points}
        assert points.keys() == {idle.ref, running.ref}
        assert len(running.tokens) == points[running.ref].num_tokens  # and none is computed meanwhile
        assert loop.wait(llm.is_paused())  # by its owner, who alone resumes it
        loop.wait(llm.resume_generation())
        repo.undrain()
        if mode == "keep":
            with pytest.raises(Drained) as caught:
                stream.result(60)
            assert caught.value.point == points[running.ref].point
        assert idle.generate("", LONG).token_ids == whole
        assert repo.session(points[idle.ref].point).generate("", LONG).token_ids == whole
        last = repo.session(points[running.ref].point)
        if mode == "wait":  # by its owner: it has ended
            assert last.tokens[-len(whole) :] == whole
        else:
            assert last.resume().token_ids == running.resume().token_ids == whole
