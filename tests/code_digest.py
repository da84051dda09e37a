"""A digest of what code does: the same where only comments, docstrings, layout or the words of a mark differ.

Of a Python file it takes the syntax tree, in a notation of its own, since `ast.dump` writes a tree differently from one
Python to the next; of any other file the bytes. Caches and hidden files do not count.
"""

from __future__ import annotations

import ast
from pathlib import Path

from thaw.core.ids import digest

LENGTH = len("b3:") + 16
"""Enough to see a change; nobody is kept from making two files of one digest."""
UNSAID = {"ctx", "kind", "type_comment", "type_ignores"}
MARKS = ("slow", "model", "all_cores", "soak", "longer_in_soak")


def digest_of(path: Path) -> str:
    """Of a file, or of all files of a folder with their names. Raises `FileNotFoundError`."""
    if not path.exists():
        raise FileNotFoundError(path)
    found = ((file.relative_to(path).as_posix(), file) for file in [path, *path.rglob("*")] if file.is_file())
    lines = [f"{name} {digest(content(file))}" for name, file in sorted(found) if not _passed_over(name)]
    return digest("\n".join(lines).encode())[:LENGTH]


def content(file: Path) -> bytes:
    found = file.read_bytes()
    return notation(ast.parse(found)).encode() if file.suffix == ".py" else found


def notation(node: object) -> str:
    if is_mark(node):
        return "a mark"
    if isinstance(node, ast.JoinedStr):
        return f"JoinedStr({[notation(part) for part in node.values if not _is_empty(part)]})"
    if isinstance(node, ast.AST):
        parts = ((name, notation(value)) for name, value in ast.iter_fields(node) if name not in UNSAID)
        said = ", ".join(f"{name}={value}" for name, value in parts if value not in ("None", "[]"))
        return f"{type(node).__name__}({said})"
    if isinstance(node, list):
        return f"[{', '.join(notation(item) for item in node if not _is_docstring(item))}]"
    return ascii(node)


def is_mark(node: object, names: tuple[str, ...] = MARKS) -> bool:
    """Whether it is `pytest.mark.slow` or another mark of a tier, with its words or without."""
    node = node.func if isinstance(node, ast.Call) else node
    return isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "pytest.mark"


def _is_docstring(node: object) -> bool:
    """A string that stands by itself: it does nothing."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_empty(node: ast.expr) -> bool:
    """What Python 3.12 leaves in some f-strings."""
    return isinstance(node, ast.Constant) and node.value == ""


def _passed_over(name: str) -> bool:
    return any(part == "__pycache__" or (part.startswith(".") and part != ".") for part in name.split("/"))
