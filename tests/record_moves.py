"""Records in receipts/moves.json that commits only moved the code that receipts of the soak cover.

    python tests/record_moves.py COMMIT [COMMIT …]    checks each, and records it or says what is no move
    python tests/record_moves.py --check              checks what is recorded, where the history has the commit

A commit says `Moves code only.` and passes `moves.py`. A merge may bring other changes as well, and the names of the
commits that it merges count. For both, what each receipt covers has to hold the same statements before and after.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import moves
from code_digest import digest_of
from recorded_moves import Move, read, write
from soak_receipts import ROOT, Group, groups


class NoMove(Exception):
    """Lines that say what the commit changed."""


def move_of(commit: str) -> Move:
    """Raises `NoMove`."""
    merged = len(moves.git("show", "-s", "--format=%P", commit).split()) > 1
    if not merged and not moves.says_so(commit):
        raise NoMove(f"its message has no line {moves.MARK!r}")
    if not merged and (found := moves.problems(commit)):
        raise NoMove("\n".join(found))
    with tree_of(f"{commit}~") as before, tree_of(commit) as after:
        known = groups(before), groups(after)
        if found := sorted(set(_lost(commit, *known))):
            raise NoMove("\n".join(found))
        return Move(moves.git("show", "-s", "--format=%s", commit).strip(), digests(before, after, *known))


@contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    packed = subprocess.run(["git", "archive", "--format=tar", commit], check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        checked: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not in every 3.10 and 3.11
        tar.extractall(folder, **checked)
        yield Path(folder)


def _lost(commit: str, before: Mapping[str, Group], after: Mapping[str, Group]) -> Iterator[str]:
    """What receipts of both trees covered before, and no longer or otherwise cover now."""
    names = renames(commit)
    touched = moves.git("diff", "--no-renames", "--name-only", f"{commit}~", commit).splitlines()
    trees = ((f"{commit}~", before), (commit, after))
    found = [{path: _statements(tree, path, names) for path in touched} for tree, _ in trees]
    for name in sorted(before.keys() & after.keys()):
        was, now = (
            sum((of for path, of in files.items() if _covers(known[name], path)), Counter())
            for files, (_, known) in zip(found, trees, strict=True)
        )
        for word, left in (("no longer covers", was - now), ("covers anew", now - was)):
            yield from (f"{name} {word}: {line}" for line in left.elements())


def renames(commit: str) -> dict[str, str]:
    """Those of its message, or of the moves that a merge brings."""
    brought = moves.git("rev-list", "--reverse", "--no-merges", f"{commit}~..{commit}").split()
    messages = (moves.git("show", "-s", "--format=%B", one) for one in brought if moves.says_so(one))
    return {old: new for message in messages for old, new in moves.RENAMED.findall(message)}


def _statements(tree: str, path: str, names: Mapping[str, str]) -> Counter[str]:
    """Of a file that is not Python, one that stands for its place and its bytes."""
    if not moves.git("ls-tree", tree, "--", path):
        return Counter()
    if not path.endswith(".py"):
        return Counter([f"{path} {moves.git('rev-parse', f'{tree}:{path}').strip()}"])
    return Counter(moves.of_module(moves.git("show", f"{tree}:{path}"), names))


def _covers(group: Group, path: str) -> bool:
    return any(path == of or path.startswith(f"{of}/") for of in (*group.covers, *group.brings))


def digests(before: Path, after: Path, *known: Mapping[str, Group]) -> dict[str, tuple[str, str]]:
    """Of the covered paths that are in both trees and differ."""
    paths = {path for by_name in known for group in by_name.values() for path in (*group.covers, *group.brings)}
    there = sorted(path for path in paths if (before / path).exists() and (after / path).exists())
    pairs = {path: (digest_of(before / path), digest_of(after / path)) for path in there}
    return {path: (old, new) for path, (old, new) in pairs.items() if old != new}


def record(commits: list[str]) -> int:
    recorded = list(read(ROOT))
    for commit in commits:
        try:
            move = move_of(commit)
        except NoMove as said:
            print(f"{commit} is not recorded:", said, sep="\n")
            return 1
        if move not in recorded:
            recorded.append(move)
        print(f"{move.subject}: {len(move.paths)} covered paths moved")
    write(ROOT, recorded)
    return 0


def check(root: Path) -> list[str]:
    """What is wrong with recorded moves. A commit that the history does not have is passed over."""
    history = [line.partition(" ") for line in moves.git("log", "--format=%H %s").splitlines()]
    found = []
    for move in read(root):
        of = [commit for commit, _, subject in history if subject == move.subject]
        if of and not any(_is(move, commit) for commit in of):
            found.append(f"{move.subject}: is not what that commit moved")
    return found


def _is(move: Move, commit: str) -> bool:
    try:
        return move_of(commit) == move
    except NoMove:
        return False


def main(arguments: list[str]) -> int:
    if arguments != ["--check"]:
        return record(arguments)
    found = check(ROOT)
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
