"""A class is found by its name: one that is not private stands in one module of the package alone."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

SRC = Path(__file__).resolve().parent.parent / "src"
TWICE = {
    "Round": "`thaw.pool.Round` is a fork pool's, `thaw.receipt.Round` a receipt's; both are in the documentation",
}
"""Public names that two packages give, each with the reason."""


def homes(src: Path) -> dict[str, list[str]]:
    """The modules that define each class, private ones left out, nested ones counted."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(src.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name in {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}:
            if not name.startswith("_"):
                found[name].append(path.relative_to(src).as_posix())
    return found


def test_a_class_name_stands_once() -> None:
    twice = {name: modules for name, modules in homes(SRC).items() if len(modules) > 1}
    assert twice.keys() - TWICE == set(), {name: twice[name] for name in twice.keys() - TWICE}


def test_no_exception_is_left_over() -> None:
    found = homes(SRC)
    assert [name for name in TWICE if len(found[name]) != 2] == []


def test_a_second_one_is_found(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("class Arena: ...\n\nclass _Own: ...\n")
    (tmp_path / "two.py").write_text("def make():\n    class Arena: ...\n\nclass _Own: ...\n")
    assert homes(tmp_path) == {"Arena": ["one.py", "two.py"]}
