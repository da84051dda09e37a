"""What the receipts in receipts/soak are of, and whether that is the code as it stands.

The mark `soak` or `longer_in_soak` of a test names the receipt that it leaves. Tests with one name are a group, whose
receipt is written when all of them held (`soak_writer.py`). It says what it covers, with a digest of each file or
folder, and is out of date once one of them differs in more than comments, whatever the dates, unless the code was only
moved since (`recorded_moves.py`). Marks are read, not imported: an engine's tests are checked where that engine is not
installed.

    python tests/soak_receipts.py            fails on receipts that are missing, broken, out of date, or of no test
    python tests/soak_receipts.py --stale    prints the commands that write those anew, one a line
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import recorded_moves
from code_digest import LENGTH, digest_of, is_mark
from recorded_moves import EMPTY, Move
from thaw import receipt as r
from thaw.core.errors import ThawError
from thaw.core.ids import digest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "receipts/soak"
MARKS = ("soak", "longer_in_soak")
ONE_CORE = "OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind"
"""As `make test` runs what is not marked all_cores."""
VLLM = ("src/thaw/engines/vllm", "src/thaw/engines/served", "src/thaw/data")
SGLANG = ("src/thaw/engines/sglang", "src/thaw/engines/served", "src/thaw/data")
COVERS = {
    "tests/engines/on_vllm": VLLM,
    "tests/engines/on_sglang": SGLANG,
    "tests/store": ("src/thaw/store", "src/thaw/data"),
    "tests/pool": ("src/thaw/pool",),
    "tests/data": ("src/thaw/data",),
}
"""What a test covers by its place, where its mark says nothing else. Always its own file too, and what that brings
along (`brought`): the law that was held."""
SUITES = {
    "vllm": (*VLLM, "src/thaw/testing", "tests/engines/on_vllm"),
    "sglang": (*SGLANG, "src/thaw/testing", "tests/engines/on_sglang"),
}
"""Engines whose other releases leave a receipt of their whole suite, and what that covers besides the versions."""
PYTHONS = {
    "tests/engines/on_vllm": ".venv-vllm",
    "tests/with_ray/on_vllm": ".venv-vllm",
    "tests/engines/on_sglang": ".venv-sglang",
    "tests/snapshot/on_vllm": ".venv-vllm",
    "tests/snapshot/on_sglang": ".venv-sglang",
}


class Group(NamedTuple):
    """Tests that leave one receipt. A site is a file, a class or a function, named as pytest names it."""

    name: str
    sites: tuple[str, ...]
    covers: tuple[str, ...]
    brings: tuple[str, ...] = ()

    @property
    def python(self) -> str:
        """That of the environment of its engine."""
        place = next((place for place in PYTHONS if self.sites and self.sites[0].startswith(place)), None)
        return f"{PYTHONS[place] if place else '.venv'}/bin/python"


class Unclear(Exception):
    """A mark that cannot be read where it stands."""


# --- which receipts there are to be


def groups(root: Path = ROOT) -> dict[str, Group]:
    """By name, those of all marks under tests and of the other releases' suites. Raises `Unclear`."""
    found: dict[str, Group] = {suite.name: suite for suite in suites(root)}
    for file in sorted((root / "tests").rglob("*.py")):
        marks = tuple(read_marks(file, file.relative_to(root).as_posix()))
        brings = brought(file, root) if marks else ()
        for place, receipt, covers in marks:
            old = found.get(receipt, Group(receipt, (), ()))
            new = (place,), covers, brings
            found[receipt] = Group(receipt, *map(joined, (old.sites, old.covers, old.brings), new))
    for group in found.values():
        for path in group.covers:
            if not (root / path).exists():
                raise Unclear(f"{group.name} covers {path}, which is not there")
    return found


def joined(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(first + second))


def suites(root: Path) -> Iterator[Group]:
    makefile = (root / "Makefile").read_text("utf-8") if (root / "Makefile").exists() else ""
    for engine, covers in SUITES.items():
        releases = re.search(rf"^{engine.upper()}_OTHERS := (.*)$", makefile, re.M)
        for release in releases[1].split() if releases else ():
            yield Group(f"suite-{engine}-{release}", (), (*covers, f"constraints-{engine}-{release}.txt"))


def read_marks(file: Path, name: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(site, receipt, what it covers) of each mark in a file of tests."""
    for site, mark in _marks(ast.parse(file.read_bytes()), name):
        said = _written_out(mark, f"{name}:{mark.lineno}")
        if "receipt" not in said:
            raise Unclear(f'{name}:{mark.lineno}: a mark of the soak names its receipt: soak("why", receipt="name")')
        covers = said.get("covers") or next((found for place, found in COVERS.items() if name.startswith(place)), None)
        if covers is None:
            raise Unclear(f"{name}:{mark.lineno}: nothing says what tests here cover: covers=(…) in the mark does")
        yield site, said["receipt"], (*covers, name)


def brought(file: Path, root: Path) -> tuple[str, ...]:
    """What a file of tests brings along, by path: the laws that it imports from `thaw.testing`, the helpers beside it
    or in a folder above, and what those import of the same."""
    found, left = [], [file]
    while left:
        new = [path for path in _imported(left.pop(), root) if path != file and path not in found]
        found += new
        left += new
    return tuple(path.relative_to(root).as_posix() for path in sorted(found))


def _imported(file: Path, root: Path) -> list[Path]:
    found = []
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found += [_module(alias.name, file, root) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [_module(node.module, file, root, alias.name) for alias in node.names]
    return list(dict.fromkeys(path for path in found if path is not None))


def _module(module: str, file: Path, root: Path, name: str = "") -> Path | None:
    """The file of a module of `thaw.testing` (where a package offers `name`, of that), or of a helper of the tests."""
    if module.partition(".")[0] == "thaw":
        base = root / "src" / module.replace(".", "/")
        return _offered(base, name, root) if module.startswith("thaw.testing") else None
    folders = (one for one in file.parents if one.is_relative_to(root / "tests"))
    beside = (folder / f"{module}.py" for folder in folders)
    return next((path for path in beside if path.is_file() and not module.startswith("test_")), None)


def _offered(base: Path, name: str, root: Path) -> Path | None:
    files = (base / f"{name}.py", base.with_suffix(".py"))
    if not base.is_dir() or files[0].is_file():
        return next((file for file in files if file.is_file()), None)
    lines = ast.walk(ast.parse((base / "__init__.py").read_bytes()))
    froms = (node for node in lines if isinstance(node, ast.ImportFrom) and name in [x.name for x in node.names])
    return next((_module(str(node.module), base, root, name) for node in froms), None)


def _marks(node: ast.AST, site: str) -> Iterator[tuple[str, ast.expr]]:
    for child in ast.iter_child_nodes(node):
        if is_mark(child, MARKS):
            yield site, child
        elif isinstance(child, ast.ClassDef) or (isinstance(child, ast.FunctionDef) and child.name.startswith("test")):
            yield from _marks(child, f"{site}::{child.name}")
        else:
            yield from _marks(child, site)


def _written_out(mark: ast.expr, where: str) -> dict[str, str]:
    keywords = mark.keywords if isinstance(mark, ast.Call) else []
    try:
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in keywords}
    except ValueError:
        raise Unclear(f"{where}: what a mark of the soak says is written out in it, so that it can be read") from None


# --- whether they are of this code


def states(root: Path, known: Mapping[str, Group]) -> dict[str, dict[str, str]]:
    """By name, what each group covers, how that stands now, and what writes its receipt."""
    paths = {path for group in known.values() for path in (*group.covers, *group.brings)}
    digests = {path: digest_of(root / path) for path in paths}
    return {
        name: {
            "covers": " ".join(group.covers),
            "covered": " ".join(digests[path] for path in group.covers),
            "brought": _together({path: digests[path] for path in group.brings}),
            "brings": ", ".join(group.brings),
            "brings_covered": " ".join(digests[path] for path in group.brings),
            "command": written_by(group),
        }
        for name, group in known.items()
    }


def _together(digests: Mapping[str, str]) -> str:
    return digest(" ".join(f"{path} {of}" for path, of in sorted(digests.items())).encode())[:LENGTH]


def problems(root: Path, known: Mapping[str, Group]) -> dict[str, str]:
    """By name, what is wrong with each receipt that is not as it should be."""
    moves = recorded_moves.read(root)
    found = ((name, problem(root / FOLDER / f"{name}.json", now, moves)) for name, now in states(root, known).items())
    return {name: said for name, said in sorted(found) if said}


def problem(path: Path, now: Mapping[str, str], moves: Sequence[Move] = ()) -> str:
    """What is wrong with a receipt, where the code that it is to be of stands so; nothing, if it is empty."""
    if not path.exists():
        return "there is none"
    try:
        verified = r.verify(path)
    except ThawError as error:
        return str(error)
    return "; ".join(verified.problems) or differs(verified.receipt, now, moves)


def differs(receipt: r.Receipt, now: Mapping[str, str], moves: Sequence[Move] = ()) -> str:
    was = receipt.parameters
    if "covered" not in was:
        return "it does not say what code it is of"
    before, after = (_by_path(str(of["covers"]), str(of["covered"])) for of in (was, now))
    steps = {path: (before.get(path, EMPTY), after.get(path, EMPTY)) for path in before | after}
    changed = [path for path, (old, new) in steps.items() if not recorded_moves.leads(path, old, new, moves)]
    if any(path not in before or path not in after for path in changed):
        return f"it is of {was['covers']}, its tests are of {now['covers']}"
    if changed:
        return f"{', '.join(changed)} changed since"
    brings = _by_path(now["brings"].replace(",", ""), now["brings_covered"])
    if was.get("brought") not in map(_together, recorded_moves.earlier(brings, moves)):
        return f"a law or helper that its tests import changed since, of {now['brings']}"
    if receipt.kind == "soak" and receipt.command != now["command"]:
        return f"it is of other tests: {receipt.command}"
    return ""


def _by_path(paths: str, digests: str) -> dict[str, str]:
    return dict(zip(paths.split(), digests.split(), strict=True))


def strangers(root: Path, known: Mapping[str, Group]) -> list[Path]:
    """Receipts that no test leaves: one that was removed, or renamed."""
    return [path for path in sorted((root / FOLDER).glob("*.json")) if path.stem not in known]


def commands(stale: Sequence[Group]) -> list[str]:
    """What writes them anew: a line for each environment, and one for each suite."""
    sites: dict[str, tuple[str, ...]] = {}
    for group in stale:
        sites[group.python] = joined(sites.get(group.python, ()), group.sites)
    tests = [command(python, of) for python, of in sites.items() if of]
    return tests + [written_by(group) for group in stale if not group.sites]


def written_by(group: Group) -> str:
    """The command in its receipt."""
    return command("python", group.sites) if group.sites else f"make soak-{group.name.removeprefix('suite-')}"


def command(python: str, sites: Sequence[str]) -> str:
    return f"THAW_SOAK=1 {ONE_CORE} {python} -m pytest -m '{' or '.join(MARKS)}' {' '.join(sites)}"


def main(arguments: list[str], root: Path = ROOT) -> int:
    known = groups(root)
    found = problems(root, known)
    if "--stale" in arguments:
        print(*commands([known[name] for name in found]), sep="\n")
        return 0
    for name, said in found.items():
        print(f"{FOLDER}/{name}.json: {said}. To renew it: {commands([known[name]])[0]}")
    for path in strangers(root, known):
        print(f"{FOLDER}/{path.name}: no test leaves it. Bring its test back, or remove it and say why.")
    return 1 if found or strangers(root, known) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Unclear as unclear:
        sys.exit(str(unclear))
