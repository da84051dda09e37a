"""What fork pools have measured on this machine, remembered in the cache folder: loads, prefills, decode steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from thaw.core.findings import Finding
from thaw.data.files import cache_dir
from thaw.pool.schedule.rates import Fit, Measured, remembered

MIB = 1 << 20


def findings() -> Iterator[Finding]:
    for measured in remembered(cache_dir()):
        text = f"a pool of {_what(measured)}: {', '.join(_rates(measured))}"
        yield Finding(name="pool-rates", status="info", text=text)


def _what(measured: Measured) -> str:
    return f"{measured.engine} {Path(measured.model).name} on {measured.device}"


def _rates(measured: Measured) -> Iterator[str]:
    """In words, each with the number of measurements behind it."""
    for tier, fit in sorted(measured.loads.items()):
        yield f"loads from {tier} at {fit.rate / MIB:,.0f} MiB/s{_fixed(fit)}"
    if measured.prefill.points:
        yield f"prefills {measured.prefill.rate:,.0f} tokens/s{_fixed(measured.prefill)}"
    if measured.step.points:
        step = measured.step
        yield f"a step takes {step.fixed_s * 1e3:.1f} ms and {step.per_unit_s * 1e3:.2f} ms a branch"
    if measured.boot_s:
        yield f"booted in {measured.boot_s:.1f} s"


def _fixed(fit: Fit) -> str:
    return f" after {fit.fixed_s * 1e3:.0f} ms" if fit.fixed_s >= 0.0005 else ""
