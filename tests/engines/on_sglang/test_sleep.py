"""Sleep and wake on SGLang. On a CPU it keeps its memory and empties its tree; sessions continue from the arena."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

pytest.importorskip("sglang")

import thaw
from sleepers import ANSWER, CYCLES, PROMPT, family, turn, undisturbed
from thaw import Sampling
from thaw.core.errors import Busy, Conflict, Unsupported
from thaw.engines import load_engine
from thaw.engines.base import GenerateRequest
from thaw.engines.sglang import versions
from thaw.engines.sglang.client.engine import SglangEngine
from thaw.repo import Repository


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path]) -> Iterator[SglangEngine]:
    with load_engine("sglang", model=str(tiny_model("llama"))) as loaded:
        assert isinstance(loaded, SglangEngine)
        yield loaded


@pytest.fixture
def repo(engine: SglangEngine, tmp_path: Path) -> Iterator[Repository]:
    with thaw.open(tmp_path / "r", engine=engine) as opened:
        yield opened
    if engine._asleep:
        engine.wake()


@pytest.mark.parametrize("level", [1, 2])
def test_twenty_sleeps_change_no_token_and_read_nothing_again(
    repo: Repository, engine: SglangEngine, level: int
) -> None:
    expected, slept = undisturbed(repo, CYCLES), family(repo)
    for i in range(CYCLES):
        assert turn(slept, i) == expected[i]
        report = repo.sleep(level=level)
        assert len(report.points) == 3 and report.num_dropped == 0
        assert repo.wake().missed == ()
        room = engine.stats()
        assert room["evictable_tokens"] == room["protected_tokens"] == 0, "the tree is empty"
    for one in slept:
        one.close()


def test_nothing_works_while_it_sleeps(repo: Repository, engine: SglangEngine) -> None:
    session = repo.session(seed=1)
    session.append(token_ids=PROMPT)
    repo.sleep()
    for use in (engine.identity, engine.open, engine.stats, engine.flush_cache, lambda: session.commit("asleep")):
        with pytest.raises(Busy, match="asleep"):
            use()
    repo.wake()
    with pytest.raises(Conflict):
        engine.wake()
    assert session.generate(token_ids=[1], sampling=ANSWER).token_ids


def test_a_request_of_somebody_elses_keeps_it_awake(repo: Repository, engine: SglangEngine) -> None:
    """SGLang would end as a whole if it were asked to release its memory then."""
    session = repo.session(seed=1)
    session.append(token_ids=PROMPT)
    with load_other(engine) as other:
        theirs = other.open()
        long = Sampling(max_tokens=1500, ignore_eos=True)
        running = other.generate([GenerateRequest(session=theirs, prompt=(1, 2), sampling=long)])
        next(iter(running))
        with pytest.raises(Busy, match="works for others"):
            repo.sleep()
        running.cancel()
        assert running.result()[0].finish_reason == "abort"
    assert not repo.is_drained and session.generate(token_ids=[1], sampling=ANSWER).token_ids


def load_other(engine: SglangEngine) -> Any:
    """Another client of the same server."""
    transport: Any = engine._transport
    return thaw.attach(transport.url, api_key=transport._headers["Authorization"].removeprefix("Bearer "))


def test_a_server_without_a_memory_saver_is_not_drained(
    repo: Repository, engine: SglangEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for levels, said in (((), "--enable-memory-saver"), ((2,), "--enable-weights-cpu-backup")):
        facts: Any = msgspec.structs.replace(engine._transport.facts, sleep_levels=levels)
        monkeypatch.setattr(engine._transport, "facts", facts)
        with pytest.raises(Unsupported, match=said):
            repo.sleep()
        assert not repo.is_drained


@pytest.mark.parametrize(
    ("device", "saver", "backup", "levels"),
    [
        ("cpu", False, False, (1, 2)),
        ("cuda", False, True, ()),
        ("cuda", True, False, (2,)),
        ("cuda", True, True, (1, 2)),
    ],
)
def test_on_a_gpu_the_memory_saver_and_a_copy_of_the_weights_are_needed(
    device: str, saver: bool, backup: bool, levels: tuple[int, ...]
) -> None:
    arguments = SimpleNamespace(enable_memory_saver=saver, enable_weights_cpu_backup=backup)
    assert versions.sleep_levels(arguments, device) == levels
