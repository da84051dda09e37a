"""Engines here boot warm, as in `tests/engines/on_vllm`, and find thaw's loader by an entry point."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import warm

HERE = Path(__file__).resolve()
ENTRY = ("vllm.general_plugins", "thaw_weights", "thaw.weights.vllm_loader:register")


def _of_engines(folder: str) -> object:
    path = HERE.parents[2] / "engines" / folder / "conftest.py"
    spec = importlib.util.spec_from_file_location(f"{folder}_boots", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def loader_is_found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An installation that is older than the entry point gets it from a folder, as any other distribution's."""
    group, name, value = ENTRY
    with pytest.MonkeyPatch.context() as patch:
        if not any(point.name == name for point in entry_points(group=group)):
            folder = tmp_path_factory.mktemp("entry")
            about = folder / "thaw_weights_entry-0.dist-info"
            about.mkdir()
            (about / "METADATA").write_text("Metadata-Version: 2.1\nName: thaw-weights-entry\nVersion: 0\n")
            (about / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
            patch.setattr(sys, "path", [str(folder), *sys.path])
            patch.setenv("PYTHONPATH", ":".join([str(folder), *_paths()]))
        yield


def _paths() -> list[str]:
    import os

    return [path for path in os.environ.get("PYTHONPATH", "").split(":") if path]


if not warm.serves({}):
    warm_boots = _of_engines("on_vllm").warm_boots  # type: ignore[attr-defined]
