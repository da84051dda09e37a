"""Write the generated pages of docs/: the command line (cli.md), the errors (errors.md), the picture of the benchmark.

`make docs` runs it; a test checks that what is checked in is what it writes.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from thaw.core import errors

DOCS = Path(__file__).resolve().parent
RECEIPT = DOCS.parent / "receipts" / "bench-fork.json"
PICTURE = DOCS / "bench-fork.svg"
README = DOCS.parent / "README.md"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
ARMS = {
    "live": "fork in the engine that holds the session",
    "hydrate-warm": "hydrate from disk, engine running",
    "hydrate-fresh": "hydrate in a fresh process, its boot included",
    "prefill-warm": "prefill again, engine running",
    "prefill-fresh": "cold start and prefill",
}

ERRORS_HEAD = """# Errors

Generated from `thaw/core/errors.py` (`make docs`). Every error thaw raises on purpose is a `thaw.ThawError`. Its `kind`
is stable: it is what `--json` prints and what scripts may test. The exit code is the command line's.

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


def figures(receipt: dict[str, Any]) -> str:
    """The README's table, from the receipt and nothing else."""
    derived = {d["name"]: d for d in receipt["derived"]}
    rows = []
    for arm, words in ARMS.items():
        one, four = (derived.get(f"{arm}.{n}.first") for n in (1, 4))
        rows.append(f"| {words} | {_seconds(one)} | {_seconds(four)} |")
    gain, stock = derived["gain.hydrate"], derived["gain.hydrate-stock"]
    tokens, cores = receipt["parameters"]["num_tokens"], receipt["machine"]["cores"]
    return (
        f"SmolLM2-135M-Instruct, a session of {tokens:,} tokens, {cores} CPU cores; medians of the run:\n\n"
        "| | first token of one child | of four children |\n|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"A hydrated first token came {gain['value']:.0f} × sooner than prefilling the session again "
        f"(paired rounds, 95 % interval {gain['low']:.0f} to {gain['high']:.0f} ×), and {stock['value']:.0f} × sooner "
        f"than stock transformers prefills it ({stock['low']:.0f} to {stock['high']:.0f} ×). The machine was shared and "
        "noisy: read the ratios."
    )


def _seconds(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    return f"{row['value'] * 1e3:,.0f} ms" if row["value"] < 1 else f"{row['value']:.1f} s"


def readme(receipt: dict[str, Any]) -> str:
    head, _, rest = README.read_text().partition(BEGIN)
    return f"{head}{BEGIN}\n{figures(receipt)}\n{END}{rest.partition(END)[2]}"


def pages() -> dict[Path, str]:
    """Every generated file and its text."""
    from thaw.bench import plot
    from thaw.cli import reference

    out = {DOCS / "errors.md": errors_page(), DOCS / "cli.md": reference.page()}
    if RECEIPT.exists():
        receipt = json.loads(RECEIPT.read_text())
        out[PICTURE] = plot.svg(receipt)
        out[README] = readme(receipt)
    return out


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(DOCS.parent)}")
