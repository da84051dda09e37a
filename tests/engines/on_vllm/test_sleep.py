"""Sleep and wake on vLLM. On a CPU vLLM pauses and keeps its memory, so a worker of the test's loses the KV cache and
tells the connector what 0.33 does on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_http import Server

pytest.importorskip("vllm")

import thaw
from sleepers import ANSWER, CYCLES, PROMPT, family, turn, undisturbed
from thaw import Sampling
from thaw.core.errors import Busy, Conflict, ThawError, Unsupported
from thaw.engines import load_engine
from thaw.engines.base import GenerateRequest
from thaw.engines.vllm.client.engine import VllmEngine
from thaw.repo import Repository


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", dtype="bfloat16", head_dim=64)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[VllmEngine]:
    options = {"enforce_eager": True, "max_model_len": 4096, "worker_extension_cls": "unmapping.Unmapping"}
    with load_engine("vllm", model=str(model), **options) as loaded:
        assert isinstance(loaded, VllmEngine)
        yield loaded


@pytest.fixture(autouse=True)
def awake(request: pytest.FixtureRequest) -> Iterator[None]:
    """One failing test leaves the next ones an engine that runs."""
    yield
    if "engine" in request.fixturenames and (engine := request.getfixturevalue("engine"))._asleep:
        engine.wake()


@pytest.fixture
def repo(engine: VllmEngine, tmp_path: Path) -> Iterator[Repository]:
    with thaw.open(tmp_path / "r", engine=engine) as opened:
        yield opened


def on_workers(engine: VllmEngine, method: str, *arguments: Any) -> None:
    """The engine's own verb for it is refused while it sleeps."""
    engine._loop.wait(engine._transport.collective_rpc(method, arguments, {}))


@pytest.mark.parametrize("level", [1, 2])
def test_twenty_sleeps_change_no_bit(repo: Repository, engine: VllmEngine, level: int) -> None:
    expected, slept = undisturbed(repo, CYCLES), family(repo)
    for i in range(CYCLES):
        assert turn(slept, i) == expected[i]
        report = repo.sleep(level=level)
        assert len(report.points) == 3 and report.num_dropped == 0, "all is in the arena, in host memory"
        on_workers(engine, "unmap", True)
        on_workers(engine, "map")
        assert repo.wake().missed == ()
    for one in slept:
        one.close()


def test_a_cache_that_is_believed_in_after_its_memory_was_lost_is_seen(repo: Repository, engine: VllmEngine) -> None:
    """The control: without the engine's sleep, which empties its table of prefixes, a session finds its old blocks."""
    expected, lost = undisturbed(repo, 2), family(repo)
    assert turn(lost, 0) == expected[0]
    on_workers(engine, "unmap", False)
    assert turn(lost, 1) != expected[1]


def test_what_would_touch_the_cache_while_it_is_unmapped_is_refused(repo: Repository, engine: VllmEngine) -> None:
    (session, *_) = family(repo)
    session.generate(token_ids=[1], sampling=ANSWER)
    engine.sleep()
    engine.wake()
    on_workers(engine, "unmap", True)
    with pytest.raises(ThawError, match="asleep"):
        session.generate(token_ids=[1], sampling=ANSWER)
    on_workers(engine, "map")
    assert repo.session(seed=1).generate(token_ids=PROMPT, sampling=ANSWER).token_ids


def test_nothing_works_while_it_sleeps(repo: Repository, engine: VllmEngine) -> None:
    session = repo.session(seed=1)
    session.append(token_ids=PROMPT)
    repo.sleep()
    for use in (
        engine.identity,
        engine.open,
        engine.stats,
        engine.release_pins,
        engine.sleep,
        engine.switch,
        lambda: engine.collective_rpc("map"),
        lambda: engine.set_policy("2"),
        lambda: engine.fork(session.ref, 1).result(),
        lambda: session.commit("asleep"),
    ):
        with pytest.raises(Busy, match="asleep"):
            use()
    assert list(session.tokens) == PROMPT
    repo.wake()
    with pytest.raises(Conflict):
        engine.wake()
    assert session.generate(token_ids=[1], sampling=ANSWER).token_ids


def test_a_running_session_keeps_the_engine_awake(repo: Repository, engine: VllmEngine) -> None:
    session = repo.session(seed=1)
    stream = session.stream(sampling=Sampling(max_tokens=400, ignore_eos=True), token_ids=PROMPT)
    next(iter(stream))
    with pytest.raises(Busy, match="1 sessions are running"):
        engine.sleep()
    assert len(stream.result().token_ids) == 400


def test_a_session_of_another_client_keeps_the_engine_awake(repo: Repository, engine: VllmEngine) -> None:
    """vLLM would stop it."""
    transport: Any = engine._transport
    with thaw.attach(transport._llm) as other:
        long = Sampling(max_tokens=1500, ignore_eos=True)
        running = other.generate([GenerateRequest(session=other.open(), prompt=(1, 2), sampling=long)])
        next(iter(running))
        with pytest.raises(Busy, match="works for others: 1 requests"):
            repo.sleep()
        running.cancel()
        assert running.result()[0].finish_reason == "abort"
    assert not repo.is_drained
    repo.sleep()
    repo.wake()


def test_a_server_that_does_not_sleep_safely_is_not_drained(
    repo: Repository, engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts: Any = msgspec.structs.replace(engine._transport.facts, sleep_levels=())
    monkeypatch.setattr(engine._transport, "facts", facts)
    session = repo.session(seed=1)
    session.append(token_ids=PROMPT)
    with pytest.raises(Unsupported, match=r"sleep"):
        repo.sleep()
    assert not repo.is_drained


@pytest.mark.parametrize("dev", [True, False])
def test_over_http_the_servers_development_routes_are_used(model: Path, tmp_path: Path, dev: bool) -> None:
    server = Server(model, tmp_path / "server", "--max-model-len", "4096", VLLM_SERVER_DEV_MODE="1" if dev else "0")
    try:
        with thaw.attach(server.url) as engine, thaw.open(tmp_path / "r", engine=engine) as repo:
            expected, slept = undisturbed(repo, 3), family(repo)
            assert turn(slept, 0) == expected[0]
            if not dev:
                with pytest.raises(Unsupported, match="VLLM_SERVER_DEV_MODE"):
                    repo.sleep()
                assert turn(slept, 1) == expected[1], "it goes on as before"
                return
            for i, level in enumerate((1, 2), 1):
                repo.sleep(level=level)
                repo.wake()
                assert turn(slept, i) == expected[i]
    finally:
        server.stop()
