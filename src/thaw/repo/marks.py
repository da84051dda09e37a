"""Marks: digits that stand in for what is said, to ask of a chat template whether, and where, it says it.

Digits come through a template that trims, quotes or capitalises. A mark is found only where it was put: what it begins
with occurs in none of the texts that it is chosen for, nor across the border of a mark and what stands beside it, since
its first digit is its only 9.
"""

from __future__ import annotations

import itertools
import re


class Marks:
    """As many marks as are wanted, told apart by number. The same texts have the same marks."""

    def __init__(self, *texts: str) -> None:
        taken = {begun for text in texts for begun in re.findall("9[0-7]{6}", text)}
        self._stem = next(stem for stem in (f"9{n:06o}" for n in itertools.count()) if stem not in taken)
        self._pattern = re.compile(f"{self._stem}([0-7]{{8}})")

    def of(self, number: int) -> str:
        """The mark of that number; as an integer it is one that a float holds."""
        return f"{self._stem}{number:08o}"

    def found(self, text: str) -> set[int]:
        """The numbers of the marks that stand in `text`."""
        return {int(digits, 8) for digits in self._pattern.findall(text)}
