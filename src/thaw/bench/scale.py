"""Numbers on paper: a linear axis from 0 with round ticks, and figures as people read them."""

from __future__ import annotations

import math


class Axis:
    """Maps [0, top] to [left, right]; `top` is rounded up to a tick."""

    def __init__(self, largest: float, left: float, right: float) -> None:
        self.step = _step(largest / 6)
        self.top = self.step * max(1, math.ceil(largest / self.step - 1e-9))
        self.ticks = tuple(self.step * i for i in range(round(self.top / self.step) + 1))
        self._left, self._width = left, right - left

    def x(self, value: float) -> float:
        return self._left + self._width * value / self.top


def _step(about: float) -> float:
    """The next of 1, 2, 5 × 10ⁿ."""
    if not about > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(about))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= about * 0.999)


def label(tick: float, step: float) -> str:
    """A tick in as many decimals as the step has."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{tick:.{decimals}f}"


def figures(value: float) -> str:
    """Three figures: 0.0123, 1.23, 34.1, 1,234."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value)) + 1e-9))
    return f"{value:,.{min(decimals, 9)}f}"


def seconds(value: float) -> str:
    """A duration: 7.4 ms, 131 ms, 4.91 s."""
    if value < 0.1:
        return f"{value * 1e3:.1f} ms"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
