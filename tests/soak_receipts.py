"""What the receipts in receipts/soak are of, and whether that is the code as it stands.

The mark `soak` or `longer_in_soak` of a test names the receipt that it leaves. Tests with one name are a group, whose
receipt is written when all of them held (`soak_writer.py`). It says what it covers, with a digest of each file or
folder, and is out of date once one of them differs in more than comments, whatever the dates. Marks are read, not
imported: an engine's tests are checked where that engine is not installed.

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

from code_digest import digest_of, is_mark
from thaw import receipt as r
from thaw.core.errors import ThawError

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
"""What a test covers by its place, where its mark says nothing else. Always its own file too: the law that was held."""
SUITES = {"vllm": VLLM, "sglang": SGLANG}
"""Engines whose other releases leave a receipt of their whole suite, and what that covers besides the versions."""
PYTHONS = {"tests/engines/on_vllm": ".venv-vllm", "tests/engines/on_sglang": ".venv-sglang"}


TO_BE_WRITTEN_ANEW = frozenset(
    (
        "database-flips", "growth", "io-share", "kill9", "pool-soak", "pool-soak-vllm", "seeded-faults", "sglang-kills",
        "sglang-law-book-in-process", "sglang-law-book-on-three-ranks", "sglang-operations-pages-of-1",
        "sglang-operations-pages-of-16", "sglang-operations-pages-of-16-on-two-ranks",
        "sglang-real-model-across-rank-counts", "suite-sglang-0.5.22", "suite-vllm-0.26", "suite-vllm-0.29",
        "vllm-bench-pool-pressure", "vllm-demo", "vllm-kills", "vllm-law-book-on-two-ranks",
        "vllm-operations-loads-in-step", "vllm-operations-loads-in-the-background", "vllm-real-model-styles-and-ways",
    )
)  # fmt: skip
"""Receipts that are missing, or from before they said what code they are of. They are named and are no error, until
each is written anew and goes from this list for good."""


class Group(NamedTuple):
    """Tests that leave one receipt. A site is a file, a class or a function, named as pytest names it."""

    name: str
    sites: tuple[str, ...]
    covers: tuple[str, ...]

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
        for place, receipt, covers in read_marks(file, file.relative_to(root).as_posix()):
            before = found.get(receipt, Group(receipt, (), ()))
            found[receipt] = Group(receipt, joined(before.sites, (place,)), joined(before.covers, covers))
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
    digests = {path: digest_of(root / path) for path in {path for group in known.values() for path in group.covers}}
    return {
        name: {
            "covers": " ".join(group.covers),
            "covered": " ".join(digests[path] for path in group.covers),
            "command": written_by(group),
        }
        for name, group in known.items()
    }


def problems(root: Path, known: Mapping[str, Group]) -> dict[str, str]:
    """By name, what is wrong with each receipt that is not as it should be."""
    found = ((name, problem(root / FOLDER / f"{name}.json", now)) for name, now in states(root, known).items())
    return {name: said for name, said in sorted(found) if said}


def problem(path: Path, now: Mapping[str, str]) -> str:
    """What is wrong with a receipt, where the code that it is to be of stands so; nothing, if it is empty."""
    if not path.exists():
        return "there is none"
    try:
        verified = r.verify(path)
    except ThawError as error:
        return str(error)
    return "; ".join(verified.problems) or differs(verified.receipt, now)


def differs(receipt: r.Receipt, now: Mapping[str, str]) -> str:
    was = receipt.parameters
    if "covered" not in was:
        return "it does not say what code it is of"
    if was["covers"] != now["covers"]:
        return f"it is of {was['covers']}, its tests are of {now['covers']}"
    pairs = zip(now["covers"].split(), str(was["covered"]).split(), now["covered"].split(), strict=True)
    changed = [path for path, before, after in pairs if before != after]
    if changed:
        return f"{', '.join(changed)} changed since"
    if receipt.kind == "soak" and receipt.command != now["command"]:
        return f"it is of other tests: {receipt.command}"
    return ""


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
    awaited = sorted(TO_BE_WRITTEN_ANEW & found.keys()) if root == ROOT else []
    if awaited:
        print(f"to be written anew: {', '.join(awaited)}")
    done = sorted(TO_BE_WRITTEN_ANEW - found.keys()) if root == ROOT else []
    for name in done:
        print(f"{FOLDER}/{name}.json is of this code: take its name out of TO_BE_WRITTEN_ANEW in {Path(__file__).name}")
    found = {name: said for name, said in found.items() if name not in awaited}
    for name, said in found.items():
        print(f"{FOLDER}/{name}.json: {said}. Anew: {commands([known[name]])[0]}")
    for path in strangers(root, known):
        print(f"{FOLDER}/{path.name}: no test leaves it. Bring its test back, or remove it and say why.")
    return 1 if found or done or strangers(root, known) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Unclear as unclear:
        sys.exit(str(unclear))
