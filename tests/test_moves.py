"""What `moves.py` takes for a move, and what it does not."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import moves

ONE = """
'''A room.'''
import os

def size(path):
    '''The size.'''
    import stat
    return os.stat(path)[stat.ST_SIZE]
"""
TWO = "from old.one import size\n\nclass Arena:\n    total = size('a')\n"

Commit = Callable[[str, dict[str, str | None]], str]


@pytest.fixture
def commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commit:
    monkeypatch.chdir(tmp_path)

    def git(*words: str) -> str:
        options = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *options, *words], check=True, capture_output=True, text=True).stdout.strip()

    def made(message: str, files: dict[str, str | None]) -> str:
        for name, text in files.items():
            if text is None:
                Path(name).unlink()
            else:
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).write_text(text)
        git("add", "-A")
        git("commit", "-q", "-m", message)
        return git("rev-parse", "HEAD")

    git("init", "-q")
    made("First", {"old/one.py": ONE, "old/two.py": TWO})
    return made


def test_a_move_with_new_imports_and_names_is_one(commit: Commit) -> None:
    made = commit(
        f"Move\n\n{moves.MARK}\nArena -> HostCache\n",
        {
            "old/one.py": None, "old/two.py": None, "new/one.py": ONE.replace("A room", "Another room"),
            "new/two.py": TWO.replace("old.one", "new.one").replace("Arena", "HostCache"),
        },
    )  # fmt: skip
    assert moves.problems(made) == []
    assert moves.main([made]) == 0


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("one", "stat.ST_SIZE", "stat.ST_MODE"),
        ("one", "The size.", "Its size."),
        ("one", "(path)", "(path, *, strict=True)"),
        ("two", "Arena", "HostCache"),
        ("two", "size('a')", "size('b')"),
    ],
)
def test_what_else_changes_is_told(commit: Commit, file: str, old: str, new: str) -> None:
    text = {"one": ONE, "two": TWO}[file]
    made = commit(f"Move\n\n{moves.MARK}\n", {f"old/{file}.py": None, f"new/{file}.py": text.replace(old, new, 1)})
    assert [line.partition(":")[0] for line in moves.problems(made)] == ["lost", "gained"]
    assert moves.main([made]) == 1


def test_a_statement_that_is_lost_or_doubled_is_told(commit: Commit) -> None:
    lost = commit(f"Move\n\n{moves.MARK}\n", {"old/two.py": None})
    assert [line.partition(":")[0] for line in moves.problems(lost)] == ["lost"]
    doubled = commit(f"Move\n\n{moves.MARK}\n", {"new/one.py": ONE})
    assert [line.partition(":")[0] for line in moves.problems(doubled)] == ["gained"]


def test_other_commits_are_not_held_to_it(commit: Commit) -> None:
    assert moves.main([commit("A change", {"old/two.py": None})]) == 0


def test_what_stands_beside_imports_counts(commit: Commit) -> None:
    guarded = "if TYPE_CHECKING:\n    import old.one\nelse:\n    bound = 1\n"
    commit("Another", {"old/three.py": guarded})
    moved = commit(f"Move\n\n{moves.MARK}\n", {"old/three.py": None, "new/three.py": guarded.replace("old.", "new.")})
    assert moves.problems(moved) == []
    made = commit(f"Move\n\n{moves.MARK}\n", {"new/three.py": guarded.replace("bound = 1", "bound = 2")})
    assert [line.partition(":")[0] for line in moves.problems(made)] == ["lost", "gained"]


def test_a_name_may_move_below_itself(commit: Commit) -> None:
    """Modules and files named in strings, and a package with the name of the module that it takes in."""
    commit("Another", {"old/three.py": "PLACES = ('old.two', 'old/two.py')\n"})
    message = f"Move\n\n{moves.MARK}\nold.two -> old.two.two\nold/two.py -> old/two/two.py\n"
    below = {"old/three.py": "PLACES = ('old.two.two', 'old/two/two.py')\n", "old/two.py": None}
    assert moves.problems(commit(message, below | {"old/two/two.py": TWO})) == []
    elsewhere = commit(message, {"old/three.py": "PLACES = ('old.one', 'old/two/two.py')\n"})
    assert [line.partition(":")[0] for line in moves.problems(elsewhere)] == ["lost", "gained"]
