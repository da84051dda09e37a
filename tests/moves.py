"""Whether a commit that says it only moves code does: its syntax trees are equal but for imports and names.

    python tests/moves.py COMMIT [COMMIT …]

A commit moves if its message has a line `Moves code only.`; a line `OLD -> NEW` for each name, module or path that
changes, in code or in its strings. What each .py file defines at its top level is gathered over all files before and
after, with the imports left out wherever they stand, and has to be the same: no statement gained, lost or altered.
Docstrings count, under the new names. What an import brings in is not followed: types and tests hold that.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping

MARK = "Moves code only."
RENAMED = re.compile(r"^\s*([\w./-]+) -> ([\w./-]+)$", re.M)


def git(*words: str) -> str:
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout


def says_so(commit: str) -> bool:
    return MARK in git("show", "-s", "--format=%B", commit).splitlines()


def problems(commit: str) -> list[str]:
    """What the commit changed beside places, imports and the names that its message lists."""
    names = dict(RENAMED.findall(git("show", "-s", "--format=%B", commit)))
    before, after = (Counter(statements(commit, tree, names)) for tree in (f"{commit}~", commit))
    changes = (("lost", before - after), ("gained", after - before))
    return [f"{word}: {line}" for word, left in changes for line in sorted(left.elements())]


def statements(commit: str, tree: str, names: Mapping[str, str]) -> Iterator[str]:
    """Each statement at the top level of each file of Python that the commit touched, as it is in `tree`, as text."""
    touched = git("diff", "--no-renames", "--name-only", f"{commit}~", commit, "--", "*.py").splitlines()
    for path in git("ls-tree", "-r", "--name-only", tree, "--", *touched).splitlines() if touched else ():
        yield from of_module(git("show", f"{tree}:{path}"), names)


def of_module(source: str, names: Mapping[str, str]) -> Iterator[str]:
    module = WithoutImports().visit(ast.parse(source))
    for number, node in enumerate(module.body):
        if number == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # what a module says of itself is of the place
        yield renamed(ast.unparse(node), names)


class WithoutImports(ast.NodeTransformer):
    def visit_Import(self, node: ast.Import) -> None: ...

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None: ...

    def visit_If(self, node: ast.If) -> ast.stmt | None:
        """`if TYPE_CHECKING:` is gone with what it imported."""
        self.generic_visit(node)
        return node if node.body or node.orelse else None


def renamed(text: str, names: Mapping[str, str]) -> str:
    """With each old name replaced, once. What is a new name already stays, though it may begin with an old one."""
    if not names:
        return text
    table = {new: new for new in names.values()} | dict(names)
    longest_first = sorted(table, key=len, reverse=True)
    return re.sub(rf"(?<![\w.])({'|'.join(map(re.escape, longest_first))})(?!\w)", lambda at: table[at[1]], text)


def main(commits: list[str]) -> int:
    found = {commit: problems(commit) for commit in commits if says_so(commit)}
    for commit, lines in found.items():
        print(f"{commit}: {f'{len(lines)} statements differ' if lines else 'moves code only'}", *lines, sep="\n  ")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or git("rev-list", "origin/main..HEAD").split()))
