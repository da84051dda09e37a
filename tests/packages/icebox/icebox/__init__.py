"""An engine that another package brings: `Icebox` is the object that a program runs, `icebox.serve` its HTTP server."""

from __future__ import annotations

from thaw.engines.base import Engine


class Icebox:
    """What a program of its own would run: it makes the engine, and outlives whoever joins it."""

    def __init__(self, model: str, policy: str = "0") -> None:
        self.engine = make(model, policy)


def make(model: str, policy: str = "0") -> Engine:
    """The model's name is its weights."""
    from thaw.engines.embedded.engine import EmbeddedEngine
    from thaw.engines.fake.backend import FakeBackend

    backend = FakeBackend(model, int(model.rpartition("-")[2]), 4096, 0.0)
    backend.name = "icebox"
    return EmbeddedEngine(backend, policy=policy)
