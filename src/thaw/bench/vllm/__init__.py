"""`thaw bench vllm`: what thaw gives a vLLM, and what it costs there, against vLLM alone, in one run.

    receipt = thaw.bench.vllm.run(Options(engine_options={"model": "…"}), progress=print)

Parts, each with its own arms: `hydrate` in a process that never saw the session, against prefilling again; `fork`
in an engine that has room, against vLLM's own prefix cache; `pressure`, returning to more sessions than the engine's
blocks hold; `idle`, plain requests in an engine with thaw's connector against one without. And three about an
accelerator, where they are asked for: `dma`, copies alone against the bus; `first`, first tokens of children that have
to be loaded; `gap`, what others feel of captures and hydrates.
"""

from __future__ import annotations

from thaw.bench.rounds import Progress
from thaw.bench.vllm.options import PARTS, Options, quick
from thaw.bench.vllm.run import run

__all__ = ["PARTS", "Options", "Progress", "quick", "run"]
