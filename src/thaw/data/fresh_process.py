"""The environment of a process that is to import this very thaw, wherever the asking one has it from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from thaw import _version


def with_this_thaw(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment`, with the folder of this thaw first on Python's path."""
    folder = str(Path(_version.__file__).resolve().parents[1])
    rest = environment.get("PYTHONPATH", "")
    return {**environment, "PYTHONPATH": f"{folder}{os.pathsep}{rest}" if rest else folder}
