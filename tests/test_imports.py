"""What importing costs: no torch, no engine, no web framework, and a bare install has all that the core needs.

Each test asks a fresh interpreter.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

SRC = Path(__file__).resolve().parent.parent / "src"
HEAVY = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "vllm", "sglang", "fastapi", "starlette", "uvicorn",
    "aiohttp", "ray", "pytest", "hypothesis",
)  # fmt: skip
RUNTIME = ("blake3", "click", "msgspec", "rfc8785", "rich")
"""What pyproject.toml declares; `test_the_list_is_the_declared_one` holds it."""
USE_IT = """
import tempfile, thaw
from pathlib import Path
with thaw.load_engine("fake") as engine:
    folder = Path(tempfile.mkdtemp()) / "runs"
    with thaw.init(folder, engine=engine) as repo:
        session = repo.session()
        session.append("a long document")
        session.commit("read it", branch="main")
        outs = session.fork(3).generate(["Why?", "How?", "Who?"], thaw.Sampling(max_tokens=8))
        assert len({out.text for out in outs}) == 3
        again = repo.session("main")
        assert again.generate("Why?", thaw.Sampling(max_tokens=8)).proof.hit
"""


def run(code: str, *flags: str) -> str:
    """The output of a fresh interpreter that runs `code` with thaw's source on its path."""
    program = f"import sys; sys.path.insert(0, {str(SRC)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, *flags, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def loaded_by(code: str) -> set[str]:
    """The top-level packages that `code` leaves in a fresh interpreter."""
    out = run(f"{code}\nimport json; print(json.dumps(sorted(sys.modules)))")
    return {name.partition(".")[0] for name in json.loads(out.splitlines()[-1])}


CHEAP = {
    "import thaw": "import thaw",
    "every public name": "import thaw; [getattr(thaw, name) for name in thaw.__all__]",
    "the engine contract": "import thaw.engines.base",
    "naming the engines": "import thaw.engines; assert 'transformers' in thaw.engines.available()",
    "the data plane": "import thaw.data.pack",
    "the store": "import thaw.store",
    "the config check": "import thaw.engines.transformers.support",
    "thaw.testing": "import thaw.testing, thaw.testing.plans, thaw.testing.resume_worker",
    "the fake engine": "import thaw; thaw.load_engine('fake').close()",
    "thaw --help": (
        "import runpy; sys.argv = ['thaw', '--help']\n"
        "try: runpy.run_module('thaw.cli', run_name='__main__')\n"
        "except SystemExit as ended: assert not ended.code"
    ),
}


@pytest.mark.parametrize("what", CHEAP)
def test_nothing_heavy_is_loaded(what: str) -> None:
    loaded = loaded_by(CHEAP[what])
    assert "thaw" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_a_submodule_that_is_a_public_name_needs_no_import_of_its_own() -> None:
    assert run("import thaw; print(thaw.snapshot.snapshot.__module__, thaw.aio.__name__)").split() == [
        "thaw.snapshot.take",
        "thaw.aio",
    ]


def test_help_says_something() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "thaw.cli", "--help"], capture_output=True, text=True, timeout=60, check=True,
        env={"PYTHONPATH": str(SRC), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert "Usage: thaw" in done.stdout and "commit" in done.stdout


@pytest.mark.slow("imports torch in a process of its own")
def test_the_check_itself_notices_a_heavy_import() -> None:
    pytest.importorskip("torch")
    assert "torch" in loaded_by("import torch")


def test_import_thaw_is_quick_about_its_own_modules() -> None:
    """`import thaw` alone loads a handful of thaw's own modules; the rest comes on first use."""
    out = run("import thaw, json; print(json.dumps([m for m in sys.modules if m.startswith('thaw')]))")
    assert len(json.loads(out)) <= 3


def test_the_list_is_the_declared_one() -> None:
    declared = {Requirement(line.strip().strip('",')).name for line in _toml_list("dependencies = [")}
    assert declared == set(RUNTIME)


def test_a_bare_install_works_end_to_end(tmp_path: Path) -> None:
    """An interpreter that sees the standard library, thaw, and what thaw declares: nothing else is there to import."""
    for dist in _closure(RUNTIME):
        for top in {file.parts[0] for file in dist.files or () if file.parts[0] not in ("..", "__pycache__")}:
            target = Path(str(dist.locate_file(top)))
            if not (tmp_path / top).exists():
                (tmp_path / top).symlink_to(target)
    code = f"sys.path.append({str(tmp_path)!r})\nimport importlib.util\n"
    code += f"assert not [m for m in {HEAVY!r} if importlib.util.find_spec(m)]\n"
    run(code + USE_IT, "-I", "-S")
    asked_for_more = run(
        code + "import thaw\ntry: thaw.load_engine('transformers', model='x')\nexcept thaw.ThawError as e: print(e)",
        "-I",
        "-S",
    )
    assert "thaw-vllm[transformers]" in asked_for_more


def _closure(names: tuple[str, ...]) -> list[Distribution]:
    """The distributions and all that they need, extras left out."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = distribution(name)
        for requirement in found[name].requires or ():
            needed = Requirement(requirement)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting.append(needed.name)
    return list(found.values())


def _toml_list(head: str) -> list[str]:
    text = (SRC.parent / "pyproject.toml").read_text(encoding="utf-8")
    body = text.split(f"\n{head}\n", 1)[1].split("\n]", 1)[0]
    return [line for line in body.splitlines() if line.strip()]
