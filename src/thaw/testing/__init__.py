"""What others need to test against thaw: small models and the engines' law book. Needs the extra `[testing]`.

    EngineTests       the conformance suite, to be subclassed (`engine_tests.py`)
    PoolTests         the same for a pool of engines (`pool_tests.py`)
    plan_from         from a capture to a hydrate plan without a repository (`plans.py`)
    resume_worker     hydrate in a fresh process and print what it generates (`resume_worker.py`)
    models            small random models that look at their KV (`models.py`)

May import everything of thaw; nothing of thaw imports it. Names load on first use: the models need no pytest.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thaw.testing.engine_tests import EngineTests, ExactnessTests
    from thaw.testing.plans import plan_from
    from thaw.testing.pool_tests import PoolTests

__all__ = ["EngineTests", "ExactnessTests", "PoolTests", "plan_from"]


def __getattr__(name: str) -> Any:
    if name in ("EngineTests", "ExactnessTests", "PoolTests"):
        import pytest

        if "thaw.testing.laws" not in sys.modules:
            pytest.register_assert_rewrite("thaw.testing.laws")
        from thaw.testing import engine_tests, pool_tests

        return getattr(pool_tests if name == "PoolTests" else engine_tests, name)
    if name == "plan_from":
        from thaw.testing.plans import plan_from

        return plan_from
    raise AttributeError(f"module 'thaw.testing' has no attribute {name!r}")
