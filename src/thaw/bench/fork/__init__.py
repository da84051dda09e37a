"""`thaw bench fork`: forks and hydrates against prefilling again, paired and alternating, in one run.

    receipt = thaw.bench.fork.run(ForkBenchOptions(engine_options={"model": "…"}), progress=print)

One session is read once and committed. Every round then takes each arm in turn: live fork, hydrate in a warm process
(page cache warm, and cold), hydrate in a fresh process, prefill again in a warm process (thaw's engine, and the stock
model), cold start with prefill: first token of one child, and of all. Then the sizes and speeds of storage.
"""

from __future__ import annotations

from thaw.bench.fork.options import ForkBenchOptions, quick
from thaw.bench.fork.run import run
from thaw.bench.rounds import Progress

__all__ = ["ForkBenchOptions", "Progress", "quick", "run"]
