"""Write the generated pages of docs/: the command line (cli.md), the errors (errors.md), the picture of the benchmark.

`make docs` runs it; a test checks that what is checked in is what it writes.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from thaw.core import errors

DOCS = Path(__file__).resolve().parent
RECEIPT = DOCS.parent / "receipts" / "bench-fork.json"
PICTURE = DOCS / "bench-fork.svg"

ERRORS_HEAD = """# Errors

Generated from `thaw/core/errors.py` (`make docs`). Every error thaw raises on purpose is a `thaw.ThawError`. Its `kind` is
stable: it is what `--json` prints and what scripts may test. The exit code is the command line's.

| class | kind | exit code | group |
|---|---|---|---|
"""


def errors_page() -> str:
    """The table of all error kinds and the tree from the module's own text."""
    kinds = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.ThawError)]
    kinds.sort(key=lambda c: (c.exit_code, len(c.__mro__), c.__name__))
    rows = "".join(f"| `{c.__name__}` | `{c.kind}` | {c.exit_code} | {c.__mro__[1].__name__} |\n" for c in kinds)
    tree = inspect.getdoc(errors) or ""
    lines = [line for line in tree.splitlines() if "──" in line or line.strip().startswith("│") or "ThawError" in line]
    return f"{ERRORS_HEAD}{rows}\n## What each one asks you to do\n\n```\n" + "\n".join(lines) + "\n```\n"


def pages() -> dict[Path, str]:
    """Every generated file and its text."""
    from thaw.bench import plot
    from thaw.cli import reference

    out = {DOCS / "errors.md": errors_page(), DOCS / "cli.md": reference.page()}
    if RECEIPT.exists():
        out[PICTURE] = plot.svg(json.loads(RECEIPT.read_text()))
    return out


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(DOCS.parent)}")
