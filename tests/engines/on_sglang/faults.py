"""A plug-in of SGLang's for tests: something goes wrong on one tensor-parallel rank alone.

A fault is there while the file NAME.RANK lies in the folder that THAW_TEST_FAULTS names:

    load      KV cannot be written into the rank's slots
    keep      the rank's arena gives no memory
    weights   a sample of the rank's weights comes out otherwise
    clock     the rank's clock is a week ahead
    hang      the rank stops in the middle of a load, and says so by the file hanging.RANK
    junk      slots that hold no token of a window have large numbers in them
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

WEEK_S = 7 * 86_400.0
JUNK = 1e4
FOUND = "found"
"""A file of this name for each process that has the plug-in."""
ENTRY = "[sglang.srt.plugins]\nthaw_test_faults = faults:register\n"


def install(folder: Path) -> str:
    """The plug-in's entry point, in a folder, and the PYTHONPATH by which processes find it. It does nothing in those
    whose environment names no folder of faults, so warm boots (`warm.py`) may have it from the start."""
    found = folder / "thaw_test_faults-1.dist-info"
    found.mkdir()
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: thaw-test-faults\nVersion: 1\n")
    (found / "entry_points.txt").write_text(ENTRY)
    paths = [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, paths))


class Faults:
    """The tests' side. `environment`: by which an engine's processes find the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "faults"
        self.folder.mkdir()
        self.environment = {"THAW_TEST_FAULTS": str(self.folder)}

    @contextmanager
    def on(self, name: str, rank: int) -> Iterator[None]:
        """In an engine that was booted under `environment`."""
        assert any(self.folder.glob(f"{FOUND}.*")), "no process of an engine has the plug-in"
        file = self.folder / f"{name}.{rank}"
        file.touch()
        try:
            yield
        finally:
            file.unlink()


def register() -> None:
    if "THAW_TEST_FAULTS" not in os.environ or "sglang.srt.managers.scheduler" not in sys.modules:
        return
    Path(os.environ["THAW_TEST_FAULTS"], f"{FOUND}.{os.getpid()}").touch()
    from thaw.core.errors import StorageFailed
    from thaw.engines.served.scheduler import records
    from thaw.engines.served.worker.host_cache import HostCache
    from thaw.engines.served.worker.weights_probe import WeightsSample
    from thaw.engines.sglang.scheduler import pins
    from thaw.engines.sglang.scheduler.kv_pool import KVPool, StripPool

    def fail_to_load(*_: Any) -> None:
        if _is_on("load"):
            raise RuntimeError("a test's fault: load")
        if _is_on("hang"):
            _file("hanging").touch()
            time.sleep(1000)

    def fail_to_keep(*_: Any) -> None:
        if _is_on("keep"):
            raise StorageFailed("a test's fault: keep")

    clear = StripPool.clear

    def fill(pool: StripPool, slots: Any) -> None:
        clear(pool, slots)
        for buffer in pool._buffers if _is_on("junk") else ():
            buffer[slots] = JUNK

    StripPool.clear = fill  # type: ignore[method-assign]
    sample: Callable[[Any], bytes] = WeightsSample._sample
    WeightsSample._sample = lambda self: sample(self) + b"other" * _is_on("weights")  # type: ignore[method-assign]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + WEEK_S * _is_on("clock"))
    records.time = pins.time = clock  # type: ignore[assignment]
    _before(KVPool, "write", fail_to_load)
    _before(HostCache, "allocate", fail_to_keep)


def _before(owner: type, name: str, act: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def both(*args: Any, **more: Any) -> Any:
        act(*args)
        return original(*args, **more)

    setattr(owner, name, both)


def _is_on(name: str) -> bool:
    return _file(name).exists()


def _file(name: str) -> Path:
    import torch.distributed as dist

    rank = dist.get_rank() if dist.is_initialized() else 0
    return Path(os.environ["THAW_TEST_FAULTS"]) / f"{name}.{rank}"
