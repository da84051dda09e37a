"""What the tests run in workers' own processes, as a trainer's weight sync would be."""

from __future__ import annotations

import struct

from thaw.engines.base import Engine
from thaw.engines.embedded.engine import EmbeddedEngine
from thaw.engines.fake.backend import FakeBackend


def broken(engine: Engine) -> None:
    raise RuntimeError("the trainer has left no weights")


def load(engine: Engine, seed: int) -> None:
    """Other weights, in place."""
    assert isinstance(engine, EmbeddedEngine) and isinstance(engine._backend, FakeBackend)
    engine._backend.weights[:] = struct.pack("<Q", seed)
