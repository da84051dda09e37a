"""What the registry knows of the fake engine."""

from __future__ import annotations

from typing import Any

from thaw.engines.base import Engine
from thaw.engines.kind import EngineKind, called


class Fake(EngineKind):
    name = "fake"
    needs_model = takes_model = False

    def load(self, **options: Any) -> Engine:
        from thaw.engines.fake import load

        return called(self.name, load, **options)


KIND = Fake()
