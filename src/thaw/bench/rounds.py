"""Rounds: arms measured one after another, collected by arm.

What else the machine does while a round runs falls on all of its arms alike; figures are ratios of arms in one round.
What an arm leaves behind falls on the next one. So the order is another one in every round, and what follows on what
in one round is turned round in the next.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from thaw.bench.sample import Sample, median_of
from thaw.receipt import Arm

Progress = Callable[[str], object]
"""Told what is being done, in a line."""
Thunk = Callable[[], Sample]
"""One measurement of an arm."""


class Rounds:
    """`measured`: by arm, (pair number, sample) in the order in which they were taken. `settle_s`: a pause before each,
    for what the one before has left running."""

    def __init__(self, progress: Progress, settle_s: float = 0.0) -> None:
        self.progress, self._settle_s = progress, settle_s
        self.measured: dict[str, list[tuple[int, Sample]]] = defaultdict(list)

    def take(self, pair: int, num_rounds: int, arms: Mapping[str, Thunk]) -> None:
        """All arms once, as the round `pair` of `num_rounds`."""
        for name in in_turn(list(arms), pair):
            self.progress(f"round {pair + 1} of {num_rounds}: {name}")
            time.sleep(self._settle_s)
            self.measured[name].append((pair, arms[name]()))

    def alternate(self, num_rounds: int, arms: Mapping[str, Thunk]) -> None:
        """Each arm once without a record, then `num_rounds` rounds."""
        for name, thunk in arms.items():
            self.progress(f"warming up: {name}")
            thunk()
        for pair in range(num_rounds):
            self.take(pair, num_rounds, arms)

    def repeat(self, pair: int, num_times: int, arms: Mapping[str, Thunk]) -> None:
        """The round `pair` of arms that are measured `num_times` each, in turn: the median of every figure."""
        inner = Rounds(self.progress, self._settle_s)
        inner.alternate(num_times, arms)
        for name, taken in inner.measured.items():
            self.measured[name].append((pair, median_of([sample for _, sample in taken])))


def in_turn(names: list[str], pair: int) -> list[str]:
    """The order of the round `pair`: reshuffled for every second one, and the reverse of the one before."""
    order = random.Random(pair // 2).sample(names, len(names))
    return order[::-1] if pair % 2 else order


def arms_of(
    measured: Mapping[str, Sequence[tuple[int, Sample]]], place: Callable[[str], Any],
    words: Callable[[str], tuple[str, str]],
) -> tuple[Arm, ...]:  # fmt: skip
    """What was measured, as a receipt's arms: in the order of `place`, with the title and text that `words` gives."""
    out = []
    for name in sorted(measured, key=place):
        title, text = words(name)
        rows = tuple(sample.as_round(pair) for pair, sample in measured[name])
        out.append(Arm(name=name, title=title, text=text, rounds=rows))
    return tuple(out)
