"""`thaw bench pool`: rounds of a fork pool against what an engine does by itself. The figures are a receipt."""

from __future__ import annotations

from thaw.bench.pool.options import PoolBenchOptions, quick
from thaw.bench.pool.run import run

__all__ = ["PoolBenchOptions", "quick", "run"]
