"""Engines here boot warm (`tests/warm`)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import warm


@pytest.fixture(scope="session", autouse=True)
def warm_boots() -> Iterator[None]:
    """The server that thaw boots is a fork, too, and its processes are. One that a test starts by itself is not."""
    if not warm.wanted():
        yield
        return
    from thaw.engines.sglang.client import boot
    from thaw.engines.sglang.settings import cpu_environment

    here = warm.path_with(Path(__file__).parent)
    warm.start(["warm_sglang"], {**cpu_environment(), "PYTHONPATH": here})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boot, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": warm.popen}))
        yield
