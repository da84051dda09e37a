"""An entry point of thaw's that an older installation lacks, from a folder, as any other distribution's; warm boots."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ENGINES = Path(__file__).resolve().parent / "engines"


@contextmanager
def found(folder: Path, group: str, name: str, value: str) -> Iterator[None]:
    """In the block, this process and those that it starts find the entry point."""
    with pytest.MonkeyPatch.context() as patch:
        if not any(point.name == name for point in entry_points(group=group)):
            about = folder / f"thaw_entry_{name}-0.dist-info"
            about.mkdir()
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: thaw-entry-{name}\nVersion: 0\n")
            (about / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
            patch.setattr(sys, "path", [str(folder), *sys.path])
            known = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
            patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *known]))
        yield


def found_in_session(group: str, name: str, value: str) -> Any:
    """A fixture that does so for all of a run, for a conftest."""

    @pytest.fixture(scope="session", autouse=True)
    def entry_is_found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        with found(tmp_path_factory.mktemp("entry"), group, name, value):
            yield

    return entry_is_found


def of_engines(folder: str) -> ModuleType:
    """The conftest of an engine's own tests."""
    spec = importlib.util.spec_from_file_location(f"{folder}_boots", ENGINES / folder / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ENGINES / folder))
        spec.loader.exec_module(module)
    return module
