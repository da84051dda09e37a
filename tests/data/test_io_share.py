"""Packs cost little beside plain files. A goal holds when the interval of the measured share includes it."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from thaw.bench.io import Arms, measure

GOAL = 0.8


def upper_end(arms: Arms) -> float:
    """The upper end of the 95 % interval of the median share: a binomial order statistic (rank 8 of 9)."""
    shares = sorted(ours / plain for ours, plain in zip(arms.thaw, arms.plain, strict=True))
    assert len(shares) == 9
    return shares[7]


@pytest.mark.slow
def test_packs_are_written_and_read_at_four_fifths_of_plain_files(tmp_path: Path) -> None:
    report = measure(tmp_path, rounds=9)
    for name, arms in (("write", report.write), ("read", report.read)):
        ours, plain = statistics.median(arms.thaw), statistics.median(arms.plain)
        print(f"{name}: {ours:.0f} MB/s against {plain:.0f}, share {arms.share:.2f}, up to {upper_end(arms):.2f}")
        assert upper_end(arms) >= GOAL, name
    assert list(tmp_path.iterdir()) == []
