"""The GPU's bench, as far as no vLLM is needed: a run of idle that was cut off goes on after the boots it has."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from thaw import receipt as r
from thaw.bench.sample import Sample
from thaw.bench.vllm import report
from thaw.receipt import Hits
from thaw.receipt.machine import this_machine

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return program(monkeypatch, "bench")


def program(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """One of benchmarks/gpu, as if it had been started there."""
    monkeypatch.syspath_prepend(str(FOLDER))
    found = importlib.util.spec_from_file_location(f"{name}_gpu", FOLDER / f"{name}.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found.loader.exec_module(module)
    return module


class Boots:
    """Stands for the processes: each writes the receipt of its boot, but for one that is cut off."""

    def __init__(self, out: Path) -> None:
        self.out, self.ran, self.cut = out, list[int](), -1

    def run(self, command: Sequence[str], *, check: bool) -> None:
        assert check
        number = int(command[command.index("--boot") + 1])
        if number == self.cut:
            raise subprocess.CalledProcessError(137, command)
        self.ran.append(number)
        values = {"tokens_per_s": 100.0 + number, "first_token_s": 1.0, "total_s": 2.0}
        measured = {name: [(number, Sample(values=values))] for name in ("idle", "stock")}
        receipt = r.make(
            kind="bench.vllm", command="", versions={}, machine=this_machine(), model=None,
            parameters={"idle_boots": 1}, arms=report.arms(measured),
        )  # fmt: skip
        (self.out / f"idle-boot-{number}.json").write_bytes(r.dumps(receipt))


def test_boots_of_idle_go_on_after_a_cut(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    boots = Boots(tmp_path)
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=boots.run))
    monkeypatch.setattr(sys, "argv", ["bench.py", "model", str(tmp_path), "idle", "--boots", "3"])
    boots.cut = 2
    with pytest.raises(subprocess.CalledProcessError):
        bench.main()
    kept = r.read(tmp_path / "bench-gpu-idle.json").arm("idle")
    assert kept is not None and [taken.pair for taken in kept.rounds] == [0, 1]
    boots.cut = -1
    bench.main()
    assert boots.ran == [0, 1, 2]
    whole = r.read(tmp_path / "bench-gpu-idle.json")
    cost = whole.number("cost.idle")
    assert cost is not None and cost.num_rounds == 3 and r.verify(r.dumps(whole)).problems == ()


def test_every_part_has_sizes_that_its_options_take(bench: ModuleType) -> None:
    from thaw.bench.vllm.options import MORE_PARTS, PARTS

    assert set(bench.SIZES) == {*PARTS, *MORE_PARTS}
    for part, sizes in bench.SIZES.items():
        options = bench.Options(engine_options={"model": "m"}, parts=(part,), **sizes)
        assert options.longest <= 131072 if part != "idle" else options.longest <= 4096


def journey(module: ModuleType, out: Path, **changed: Sample) -> r.Receipt:
    """A run of two cards of which every arm is made up: `changed` by its name with _ for a dot."""
    run = module.Journey("model", out, True, 2)
    info = SimpleNamespace(name="vllm", version="0", numerics={}, device="cpu")
    run.about = {"model": None, "info": info}
    for kind in module.WORDS:
        for pair in range(2):
            same = {name: "b3:" + "a" * 64 for name in ("tokens", "logprobs", "bytes")}
            hits = Hits(num_prompt_tokens=9, num_wanted_tokens=5, num_cached_tokens=5, num_prefilled_tokens=4)
            usual = Sample(values={"first_token_s": 1.0 + pair, "difference": 0.1}, outputs=same, hits=hits)
            run.rounds.measured[f"{kind}.300"].append((pair, changed.get(kind.replace(".", "_"), usual)))
    receipt: r.Receipt = run.seal()
    assert r.verify(r.dumps(receipt)).problems == ()
    return receipt


def test_a_mix_up_of_cards_that_nothing_notices_is_a_goal_missed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = program(monkeypatch, "two_cards")
    blind = {goal.name: goal.held for goal in journey(module, tmp_path).goals}
    assert not blind["close.exchanged.300.difference"] and blind["close.one.300.difference"]
    seeing = journey(module, tmp_path, close_exchanged=Sample(values={"difference": 9.0}))
    assert all(goal.held for goal in seeing.goals)


def test_other_bytes_on_one_card_break_a_promise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = program(monkeypatch, "two_cards")
    assert all(check.held for check in journey(module, tmp_path).checks if check.promised)
    other = Sample(values={"num_tokens": 300.0}, outputs={"bytes": "b3:" + "b" * 64})
    broken = journey(module, tmp_path, bytes_over=other)
    assert [c.name for c in broken.checks if c.promised and not c.held] == ["same-bytes.bytes.over.300"]


def test_only_one_card_is_seen_inside_and_all_again_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = program(monkeypatch, "two_cards"), "CUDA_VISIBLE_DEVICES"
    for before, inside in ((None, "1"), ("4,6", "6")):
        monkeypatch.delenv(name, raising=False)
        if before is not None:
            monkeypatch.setenv(name, before)
        with module._only_card(1):
            assert os.environ[name] == inside
        assert os.environ.get(name) == before


def test_the_planner_is_made_to_prefill_and_then_chooses_again(monkeypatch: pytest.MonkeyPatch) -> None:
    module = program(monkeypatch, "planner")
    sooner = {"hydrate": 1.0, "prefill": 2.0}
    assert module._prefilling(lambda: module.planner._sooner(sooner)) is True
    assert module.planner._sooner(sooner) is False


def test_what_memory_may_grow_is_asked_of_the_last_cycle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = program(monkeypatch, "memory")
    turns = module.Turns(SimpleNamespace(cycles=3, out=tmp_path, small=True, readers=0))
    turns.about = {"model": None, "accelerator": None, "engine": "vllm 0", "numerics": {}}
    turns.processes = {arm: SimpleNamespace(stdin=io.StringIO()) for arm in module.WORDS}
    told = {"thaw": iter(range(100, 200, 20)), "stock": iter([90] * 5)}
    monkeypatch.setattr(turns, "_answer", lambda arm: memories(next(told[arm]) << 20))
    for number in range(3):
        for arm in module.WORDS:
            turns._cycle(arm, number)
    receipt = turns.seal()
    grown, more = receipt.number("grown.thaw.gpu"), receipt.number("more.gpu")
    assert grown is not None and more is not None
    assert (grown.high, more.low, more.high) == (40 << 20, 10 << 20, 50 << 20)
    held = {goal.name: goal.clear for goal in receipt.goals}
    assert held == {"more.gpu": True, "grown.thaw.gpu": False, "more.client": True, "grown.thaw.client": False}


def memories(nbytes: int) -> dict[str, int]:
    return {"gpu_nbytes": nbytes, "client_nbytes": nbytes, "engine_nbytes": nbytes}
