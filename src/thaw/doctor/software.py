"""Which software is here: Python, thaw and whether it is the right one, SQLite, engines."""

from __future__ import annotations

import importlib.util
import sqlite3
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from importlib.metadata import EntryPoint

from thaw._version import __version__
from thaw.core.errors import NotFound
from thaw.core.findings import Finding
from thaw.engines.kind import EngineKind
from thaw.engines.registry import GROUP, OWN, available, kinds, made

DISTRIBUTION = "thaw-vllm"
INSTALL = "Install thaw from its clone (make install, or pip install /path/to/the/clone)."
MIN_PYTHON, MIN_SQLITE = (3, 10), (3, 35, 0)


def findings() -> Iterator[Finding]:
    yield _python()
    yield _thaw()
    yield from _others()
    yield _sqlite()
    yield from _engines()


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info[:2] >= MIN_PYTHON
    return Finding(
        name="python",
        status="ok" if good else "problem",
        text=f"Python {version}",
        advice="" if good else "thaw needs Python 3.10 or newer.",
    )


def _thaw() -> Finding:
    """Whether the distribution of our name is ours: it declares our engines, another's does not."""
    try:
        found = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return Finding(name="thaw", status="info", text=f"thaw {__version__}, run from its source tree (not installed)")
    if not is_ours(found):
        return Finding(
            name="thaw",
            status="problem",
            text=f"the installed distribution {DISTRIBUTION} {found.version} is an unrelated project with that name",
            advice=f"pip uninstall {DISTRIBUTION}. {INSTALL}",
        )
    if found.version != __version__:
        return Finding(
            name="thaw",
            status="warning",
            text=f"thaw {__version__} runs, but {DISTRIBUTION} {found.version} is installed",
            advice=f"Two copies are on the path. {INSTALL}",
        )
    return Finding(name="thaw", status="ok", text=f"thaw {__version__}, installed as {DISTRIBUTION}")


def is_ours(distribution: metadata.Distribution) -> bool:
    """The marker: an entry point of our group that names an engine of ours."""
    return any(p.group == GROUP and p.value.startswith("thaw.engines.") for p in distribution.entry_points)


def _others() -> Iterator[Finding]:
    """Other distributions that bring a module `thaw`: whichever comes first on the path would be imported."""
    names = {name.lower().replace("_", "-") for name in metadata.packages_distributions().get("thaw", ())}
    for name in sorted(names - {DISTRIBUTION}):
        yield Finding(
            name="thaw-module",
            status="problem",
            text=f"the distribution {name} also provides a module named thaw",
            advice=f"pip uninstall {name}, or keep the two in separate environments.",
        )


def _sqlite() -> Finding:
    good = sqlite3.sqlite_version_info >= MIN_SQLITE
    need = ".".join(map(str, MIN_SQLITE))
    return Finding(
        name="sqlite",
        status="ok" if good else "warning",
        text=f"SQLite {sqlite3.sqlite_version}",
        advice="" if good else f"thaw is tested with SQLite {need} and newer; use a newer Python build.",
    )


def _engines() -> Iterator[Finding]:
    for name, point in sorted(available().items()):
        try:
            kind = made(point)
        except NotFound as error:
            advice = f"Fix or remove the package that provides {point.value}."
            yield Finding(name=f"engine.{name}", status="warning", text=str(error), advice=advice)
            continue
        yield _engine(kind, point)


def _engine(kind: EngineKind, point: EntryPoint) -> Finding:
    name = f"engine.{kind.name}"
    if not kind.packages and kind.name not in OWN:
        return Finding(name=name, status="info", text=f"engine {kind.name}, provided by {point.value}")
    missing = [package for package in kind.packages if not _is_here(package)]
    if missing:
        text = f"engine {kind.name} is not installed ({', '.join(missing)} missing)"
        return Finding(name=name, status="info", text=text, advice=kind.advice)
    versions = ", ".join(f"{package} {_version(kind, package)}" for package in kind.packages[:2])
    return Finding(name=name, status="ok", text=f"engine {kind.name} ({versions or 'nothing to install'})")


def engines_own() -> Iterator[Finding]:
    """What each kind of engine has to say of this environment."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one that cannot be imported is among `findings`
        found = list(kinds())
    for kind in found:
        yield from kind.findings()


def _is_here(package: str) -> bool:
    """Whether it can be imported. A folder of its name on the path is found too, and is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def _version(kind: EngineKind, package: str) -> str:
    for name in kind.builds.get(package, (package,)):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"
