"""The GPU's bench, as far as no vLLM is needed: a run of idle that was cut off goes on after the boots it has."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from thaw import receipt as r
from thaw.bench.sample import Sample
from thaw.bench.vllm import report
from thaw.receipt.machine import this_machine

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    found = importlib.util.spec_from_file_location("bench_gpu", FOLDER / "bench.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
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
