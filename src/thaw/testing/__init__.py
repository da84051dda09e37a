"""What others need to test against thaw: small models and the engines' law book. Needs the extra `[testing]`.

    EngineTests          the conformance suite, to be subclassed (`engine_tests.py`)
    CrossingTests        two engines that take each other's snapshots (`laws/crossing_law.py`)
    PressureTests        an engine with little room (`laws/pressure_law.py`)
    KilledEngineTests    an engine whose processes are killed (`laws/killed_law.py`)
    PoolTests            the book for a pool of engines (`pool_tests.py`)
    plan_from            from a capture to a hydrate plan without a repository (`plans.py`)
    resume_worker        hydrate in a fresh process and print what it generates (`resume_worker.py`)
    reference            what a model says without an engine (`reference.py`)
    models               small random models that look at their KV (`models.py`)

May import everything of thaw; nothing of thaw imports it. Names load on first use: the models need no pytest.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thaw.testing.engine_tests import EngineTests, ExactnessTests
    from thaw.testing.laws.crossing_law import CrossingTests
    from thaw.testing.laws.killed_law import KilledEngineTests
    from thaw.testing.laws.pressure_law import PressureTests
    from thaw.testing.plans import plan_from
    from thaw.testing.pool_tests import PoolTests

__all__ = [
    "CrossingTests", "EngineTests", "ExactnessTests", "KilledEngineTests", "PoolTests", "PressureTests", "plan_from",
]  # fmt: skip

_TESTS = {
    "CrossingTests": "laws.crossing_law",
    "EngineTests": "engine_tests",
    "ExactnessTests": "engine_tests",
    "KilledEngineTests": "laws.killed_law",
    "PoolTests": "pool_tests",
    "PressureTests": "laws.pressure_law",
}


def __getattr__(name: str) -> Any:
    if name in _TESTS:
        import pytest

        if "thaw.testing.laws" not in sys.modules:
            pytest.register_assert_rewrite("thaw.testing.laws")
        return getattr(importlib.import_module(f"thaw.testing.{_TESTS[name]}"), name)
    if name == "plan_from":
        from thaw.testing.plans import plan_from

        return plan_from
    raise AttributeError(f"module 'thaw.testing' has no attribute {name!r}")
