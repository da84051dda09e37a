"""What this machine was measured to do, for one engine and model: how fast KV is loaded and tokens are prefilled.

A time is modelled as `fixed + amount / rate`, fitted by least squares over the last measurements, refitted with each.
The numbers are remembered between pools in a small JSON file of the cache folder, which `thaw doctor` shows.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import msgspec

from thaw.core.canonical import decode_stored
from thaw.core.ids import digest
from thaw.data.files import write_atomic

KEEP = 64
FOLDER = "pool"


class Fit(msgspec.Struct, kw_only=True):
    """`seconds(amount) = fixed_s + amount * per_unit_s`, from `points` of (amount, seconds)."""

    points: list[tuple[float, float]] = []
    fixed_s: float = 0.0
    per_unit_s: float = 0.0

    def add(self, amount: float, seconds: float) -> None:
        self.points = [*self.points[-(KEEP - 1) :], (float(amount), float(seconds))]
        self.fixed_s, self.per_unit_s = line(self.points)

    def seconds(self, amount: float) -> float | None:
        """None while nothing was measured."""
        return self.fixed_s + amount * self.per_unit_s if self.points else None

    @property
    def rate(self) -> float:
        """Units a second, beside the fixed part; 0 while unknown."""
        return 1.0 / self.per_unit_s if self.per_unit_s > 0 else 0.0


def line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """(fixed, slope) of the least-squares line with neither below zero; through 0 where amounts do not vary."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread > 0 else -1.0
    fixed = mean_y - slope * mean_x
    if slope <= 0 or fixed < 0:
        square = sum(x * x for x, _ in points)
        return 0.0, sum(x * y for x, y in points) / square if square else 0.0
    return fixed, slope


class Measured(msgspec.Struct, kw_only=True):
    """Everything measured for one engine and model. `loads`: by tier, over bytes; `prefill`: over tokens;
    `step`: seconds of one decode step, over branches in the batch."""

    engine: str
    model: str
    device: str
    loads: dict[str, Fit] = {}
    prefill: Fit = msgspec.field(default_factory=Fit)
    step: Fit = msgspec.field(default_factory=Fit)
    boot_s: float = 0.0


class Rates:
    """The measurements of one pool; safe from any thread."""

    def __init__(self, engine: str, model: str, device: str, cache: Path | None) -> None:
        name = digest(f"{engine}|{model}|{device}".encode())[3:19]
        self._path = None if cache is None else cache / FOLDER / f"{name}.json"
        self._lock = threading.Lock()
        self.measured = _read(self._path) or Measured(engine=engine, model=model, device=device)

    def load(self, tier: str, nbytes: int, seconds: float, link: str = "") -> None:
        """What came over a link is noted for that link too."""
        with self._lock:
            for name in (tier, *([_named(tier, link)] if link else [])):
                self.measured.loads.setdefault(name, Fit()).add(nbytes, seconds)

    def prefilled(self, tokens: int, seconds: float) -> None:
        with self._lock:
            self.measured.prefill.add(tokens, seconds)

    def stepped(self, branches: int, seconds: float) -> None:
        with self._lock:
            self.measured.step.add(branches, seconds)

    def booted(self, seconds: float) -> None:
        with self._lock:
            self.measured.boot_s = seconds

    def costs(self, tier: str, nbytes: int, tokens: int, link: str = "") -> dict[str, float]:
        """Expected seconds to load so many bytes and to prefill so many tokens, as far as they were measured; over a
        link that was not used yet as over the others."""
        with self._lock:
            loads = self.measured.loads
            fits = {
                "hydrate": ((link and loads.get(_named(tier, link))) or loads.get(tier), nbytes),
                "prefill": (self.measured.prefill, tokens),
            }
            return {
                name: fit.fixed_s + amount * fit.per_unit_s
                for name, (fit, amount) in fits.items()
                if fit is not None and fit.points
            }

    def step_s(self, branches: int) -> float | None:
        with self._lock:
            return self.measured.step.seconds(branches)

    def summary(self) -> dict[str, float]:
        """By name, for people and statistics."""
        with self._lock:
            found = {f"load.{tier}.bytes_per_s": fit.rate for tier, fit in self.measured.loads.items()}
            found["prefill.tokens_per_s"] = self.measured.prefill.rate
            found["step.fixed_s"] = self.measured.step.fixed_s
            found["step.per_branch_s"] = self.measured.step.per_unit_s
        return {name: value for name, value in found.items() if value}

    def save(self) -> None:
        """Remember them. A cache that cannot be written is no reason to fail."""
        if self._path is not None:
            with self._lock, contextlib.suppress(OSError):
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_atomic(self._path, msgspec.json.encode(self.measured))


def remembered(cache: Path) -> list[Measured]:
    """What pools on this machine have measured."""
    found = [_read(path) for path in sorted((cache / FOLDER).glob("*.json"))]
    return [measured for measured in found if measured is not None]


def _named(tier: str, link: str) -> str:
    return f"{tier} {link}" if link else tier


def _read(path: Path | None) -> Measured | None:
    if path is None:
        return None
    try:
        return decode_stored(path.read_bytes(), Measured)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
