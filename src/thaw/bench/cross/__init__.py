"""One session that crosses engines, each in its own environment: what of it stays equal, and what the numbers do."""

from thaw.bench.cross.options import CrossBenchOptions
from thaw.bench.cross.run import run

__all__ = ["CrossBenchOptions", "run"]
