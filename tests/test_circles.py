"""Imports only point down, inside packages too: no two modules need one another to run.

Counted is every import in the source, those in functions as well. Not counted are the doors of packages, which load
what they are asked for by name (`__getattr__`), and that a module brings its package along. What stands under
`TYPE_CHECKING` is told apart: circles that it closes are listed, each with its reason.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

SRC = Path(__file__).resolve().parent.parent / "src"
Graph = Mapping[str, set[str]]

NAMED = {
    "repo.group, repo.session, repo.talk": "a session forks to a group of sessions, and both answer by the same talk",
    "pool.session, pool.shm.shared_store, pool.stores, pool.values, pool.workers.worker": "a result has its session",
    "engines.served.client.request, engines.served.client.session": "a session knows the request that it is busy with",
    "engines.sglang.scheduler.commands, engines.sglang.scheduler.scheduler": "commands work on the whole side, which makes them",  # noqa: E501
    "engines.vllm.scheduler.commands, engines.vllm.scheduler.scheduler": "commands work on the whole side, which makes them",  # noqa: E501
    "store.db, store.upgrade": "an upgrade writes a database, which brings an older one up where it may only read",
}
"""Circles that only a type closes, and why it is named."""
ROOT = ("thaw.bench.", "thaw.demo.", "thaw.testing.")
"""Who may import `thaw` itself, whose names stand for what lies below all of it."""


def modules(src: Path) -> dict[str, Path]:
    paths = {path: path.relative_to(src).with_suffix("").parts for path in sorted(src.rglob("*.py"))}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in paths.items()}


def graph(src: Path, *, types: bool) -> dict[str, set[str]]:
    """module -> the modules that it imports; with `types` those that it only names as types as well."""
    known = modules(src)
    return {name: set(imported(ast.parse(path.read_text()), known, types)) - {name} for name, path in known.items()}


def imported(node: ast.AST, known: Mapping[str, Path], types: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name in known)
        elif isinstance(child, ast.ImportFrom):
            assert child.module is not None and not child.level, "a relative import"
            for alias in child.names:
                yield from [name for name in (f"{child.module}.{alias.name}", child.module) if name in known][:1]
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test) and not types:
            yield from imported(ast.Module(child.orelse, []), known, types)
        else:
            yield from imported(child, known, types)


def circles(arrows: Graph) -> set[str]:
    """The modules that reach one another, of each circle as one text without the package's name."""
    reached = {name: set(reach(name, arrows)) for name in arrows}
    whole = (sorted(other for other in there if name in reached[other]) for name, there in reached.items())
    return {", ".join(name.removeprefix("thaw.") for name in circle) for circle in whole if circle}


def reach(name: str, arrows: Graph) -> Iterator[str]:
    """Everything that `name` imports, and what that imports; itself only if something leads back."""
    seen: set[str] = set()
    waiting = list(arrows[name])
    while waiting:
        if (at := waiting.pop()) not in seen:
            seen.add(at)
            yield at
            waiting.extend(arrows[at])


def test_no_two_modules_need_one_another_to_run() -> None:
    assert circles(graph(SRC, types=False)) == set()


def test_circles_of_types_are_those_that_are_known() -> None:
    assert circles(graph(SRC, types=True)) == set(NAMED)


def test_nothing_below_imports_the_whole_package() -> None:
    below = [name for name, arrows in graph(SRC, types=False).items() if "thaw" in arrows and not name.startswith(ROOT)]
    assert below == []


def test_a_circle_is_found_wherever_its_imports_stand(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("def run():\n    from two import two\n    return two\n")
    (tmp_path / "two.py").write_text("import three\n\ntwo = 2\n")
    (tmp_path / "three.py").write_text("if TYPE_CHECKING:\n    from one import run\nelse:\n    import four\n")
    (tmp_path / "four.py").write_text("")
    assert circles(graph(tmp_path, types=False)) == set()
    assert graph(tmp_path, types=False)["three"] == {"four"}
    assert circles(graph(tmp_path, types=True)) == {"one, three, two"}
