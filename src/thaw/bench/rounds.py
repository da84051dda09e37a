"""Rounds: arms measured one after another, each round beginning with another arm, collected by arm.

What else the machine does while a round runs falls on all of its arms alike; figures are ratios of arms in one round.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from thaw.bench.sample import Sample
from thaw.receipt import Arm

Progress = Callable[[str], object]
"""Told what is being done, in a line."""
Thunk = Callable[[], Sample]
"""One measurement of an arm."""


class Rounds:
    """`measured`: by arm, (pair number, sample) in the order in which they were taken."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.measured: dict[str, list[tuple[int, Sample]]] = defaultdict(list)

    def take(self, pair: int, num_rounds: int, arms: Mapping[str, Thunk]) -> None:
        """All arms once, as the round `pair` of `num_rounds`."""
        names = list(arms)
        shift = pair % len(names)
        for name in names[shift:] + names[:shift]:
            self.progress(f"round {pair + 1} of {num_rounds}: {name}")
            self.measured[name].append((pair, arms[name]()))

    def alternate(self, num_rounds: int, arms: Mapping[str, Thunk]) -> None:
        """Each arm once without a record, then `num_rounds` rounds."""
        for name, thunk in arms.items():
            self.progress(f"warming up: {name}")
            thunk()
        for pair in range(num_rounds):
            self.take(pair, num_rounds, arms)


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
