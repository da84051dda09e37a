"""Engines here boot warm (`tests/warm.py`)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from types import SimpleNamespace

import faults
import pytest

import warm

IMPORTED = (
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.models.llama",
    "thaw.engines.sglang.scheduler.radix_cache",
    "thaw.engines.sglang.plugin",
    "thaw.engines.sglang.serve",
)
"""What each process of SGLang imports before it does anything."""


@pytest.fixture(scope="session", autouse=True)
def warm_boots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The server that thaw boots is a fork, too, and its processes are. One that a test starts by itself is not."""
    folder = tmp_path_factory.mktemp("plugin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", faults.install(folder))
        patch.syspath_prepend(folder)  # a fork takes this process's path
        if warm.wanted():
            from thaw.engines.sglang.client import boot
            from thaw.engines.sglang.settings import cpu_environment

            warm.start(IMPORTED, cpu_environment())
            patch.setattr(boot, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": warm.popen}))
        yield
