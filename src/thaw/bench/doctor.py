"""`thaw.doctor` under the name that it had: `thaw.bench.doctor.examine` and what it returns."""

from __future__ import annotations

from thaw.doctor import DoctorReport, Figure, Finding, ModelReport, examine

__all__ = ["DoctorReport", "Figure", "Finding", "ModelReport", "examine"]
