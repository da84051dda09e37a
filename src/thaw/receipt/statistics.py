"""The few statistics of receipts, in plain arithmetic so that anybody can do them again.

Timings are compared as ratios of paired rounds: what else the machine does falls on both sides. The interval of a
ratio is Student's t on the logarithms of the pairs' ratios: exp(mean ± t(0.975, n-1) · sd / √n).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from thaw.core.errors import InvalidRequest

_T975 = (
    12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139,
    2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963,
    2.079614, 2.073873, 2.068658, 2.063899, 2.059539, 2.055529, 2.051831, 2.048407, 2.045230, 2.042272,
)  # fmt: skip
"""Quantiles of Student's t at 0.975 for 1 … 30 degrees of freedom (tabulated; Abramowitz & Stegun, table 26.10)."""


def t975(degrees: int) -> float:
    """The quantile for `degrees` >= 1; beyond 30 that of 30, which is a little wider than it need be."""
    return _T975[min(degrees, len(_T975)) - 1]


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that at least `percent` of 100 of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def summary(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, least, largest)."""
    return median(values), min(values), max(values)


def ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """(geometric mean of over / under pair by pair, low, high of its 95 % interval). All values must be positive."""
    if not over or len(over) != len(under) or min(*over, *under) <= 0:
        raise InvalidRequest("a ratio needs pairs of positive values")
    logs = [math.log(a) - math.log(b) for a, b in zip(over, under, strict=True)]
    mean = math.fsum(logs) / len(logs)
    half = 0.0
    if len(logs) > 1:
        variance = math.fsum((x - mean) ** 2 for x in logs) / (len(logs) - 1)
        half = t975(len(logs) - 1) * math.sqrt(variance / len(logs))
    return _exp(mean), _exp(mean - half), _exp(mean + half)


def quotient(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """(median of over / under pair by pair, least, largest). `under` must not be zero."""
    if not over or len(over) != len(under) or 0.0 in under:
        raise InvalidRequest("a quotient needs pairs of values, the lower ones not zero")
    return summary([a / b for a, b in zip(over, under, strict=True)])


def _exp(x: float) -> float:
    """e to the x, held inside what a float can say."""
    return math.exp(max(-700.0, min(700.0, x)))
