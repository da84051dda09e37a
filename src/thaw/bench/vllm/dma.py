"""Loads and saves alone, against the bus: thaw's copies between pinned host memory and the engine's blocks, and bare
copies of the same host memory to a buffer of the device's, in the same worker."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from thaw.bench.rounds import Rounds
from thaw.bench.vllm.inside import WAYS, copy_alone
from thaw.bench.vllm.options import Options

if TYPE_CHECKING:
    from thaw.engines.served.client.engine import ServedEngine


def measure(rounds: Rounds, options: Options, engine: ServedEngine) -> None:
    for length in options.lengths:
        arms = {f"{way}.{length}": partial(copy_alone, engine, way, length) for way in WAYS}
        rounds.alternate(options.copy_rounds, arms)
