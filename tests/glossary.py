"""docs/glossary.md as rows, and which of the names in it a source tree has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "glossary.md"
THAW, WHAT, VLLM, SGLANG = range(4)
NAME = re.compile(r"`([A-Za-z_][\w.]*)`")


def rows(text: str | None = None) -> list[list[str]]:
    """The cells of each row of the page's tables, without their heads."""
    lines = (PAGE.read_text(encoding="utf-8") if text is None else text).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in cells if row[0] != "thaw" and not set(row[0]) <= {"-"}]


def names(column: int) -> set[str]:
    """What stands in `code` in that column."""
    return {name for row in rows() for name in NAME.findall(row[column])}


def defined(src: Path) -> set[str]:
    """Classes, functions, and methods as `Class.method`."""
    return {name for path in src.rglob("*.py") for name in _of(ast.parse(path.read_text(encoding="utf-8")), "")}


def _of(node: ast.AST, within: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield within + child.name
            yield from _of(child, f"{child.name}." if isinstance(child, ast.ClassDef) else "")


def unknown(wanted: Iterable[str], src: Path) -> set[str]:
    """Those that stand in no file of Python under `src`, as whole words."""
    left = set(wanted)
    for path in src.rglob("*.py"):
        if not left:
            break
        text = path.read_text(encoding="utf-8", errors="replace")
        left -= {name for name in left if re.search(rf"\b{re.escape(name)}\b", text)}
    return left
