"""`thaw doctor`: what works here, and what a model would cost, as plain values.

    report = thaw.doctor.examine(config="path/to/config.json")

Looks at Python, thaw (and whether the distribution of its name is the right one), SQLite, engines, shared memory, the
disk and file system of the repository, the server that it started, what pools have measured; for a model's config
alone: supported or not and why, KV bytes a token, load against prefill. Boots no engine; one that is loaded may be
handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from thaw.core.findings import Finding
from thaw.doctor import model as models
from thaw.doctor import place, pools, server, software, speed
from thaw.doctor.report import DoctorReport, Figure, ModelReport
from thaw.engines.base import Engine

__all__ = ["DoctorReport", "Figure", "Finding", "ModelReport", "examine"]


def examine(
    *,
    config: str | Path | None = None,
    dtype: str | None = None,
    engine: Engine | None = None,
    repository: str | Path = ".",
    measure: bool = True,
    progress: Callable[[str], object] = lambda _: None,
) -> DoctorReport:
    """Look at everything. `config`: a config.json, or a model's folder, whose files are looked at, too; `dtype`:
    other than the config's.

    `engine`: a loaded one, whose prefill is measured (a short one). `repository`: where one lies or will lie. `measure`
    False leaves out whatever takes longer than a moment. Raises `NotFound`, `InvalidRequest` for a config that is none.
    """
    report = None if config is None else models.report(*models.read_config(Path(config)), dtype)
    folder = Path(repository)
    findings = [
        *software.findings(),
        *software.engines_own(),
        *place.findings(folder),
        *server.findings(folder),
        *pools.findings(),
    ]
    if report is not None:
        findings.append(models.finding(report))
    if report is not None and config is not None and Path(config).is_dir():
        findings += models.files(Path(config), report)
    return DoctorReport(
        findings=tuple(findings),
        model=report,
        figures=tuple(_figures(report, engine, Path(repository), progress)) if measure else (),
    )


def _figures(
    report: ModelReport | None, engine: Engine | None, repository: Path, progress: Callable[[str], object]
) -> list[Figure]:
    folder = place.nearest(repository)
    progress("measuring the disk")
    rates = speed.storage(folder) if place.writable(folder) else []
    if report is None:
        return rates
    progress("measuring the prefill" if engine is not None else "estimating the prefill")
    return rates + speed.of_model(report, rates, engine)
