"""A receipt of the soak stays fresh where the code that it covers was only moved, and nowhere else."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

import record_moves
import recorded_moves
from moves import MARK
from soak_receipts import groups, problems

pytest_plugins = ["pytester"]

SOAK = """
import pytest
import leaks

@pytest.mark.soak("kills", receipt="kills"COVERS)
def test_a_kill():
    pass
"""
PACKS, INDEX, ROOM = "src/thaw/store/packs.py", "src/thaw/store/index.py", "src/thaw/store/room/packs.py"
WRITE = "def write(blob):\n    return len(blob) + 1\n"
READ = "from thaw.store.packs import write\n\ndef read():\n    return write\n"
FILES: dict[str, str | None] = {
    PACKS: WRITE,
    INDEX: READ,
    "src/thaw/data/a.bin": "x",
    "tests/store/leaks.py": "PLACE = 'thaw.store.packs.write'\n",
    "tests/store/test_a.py": SOAK.replace("COVERS", ""),
}
INTO_A_ROOM: dict[str, str | None] = {
    PACKS: None,
    ROOM: WRITE.replace("write", "put"),
    INDEX: READ.replace("packs", "room.packs").replace("write", "put"),
    "tests/store/leaks.py": "PLACE = 'thaw.store.room.packs.put'\n",
}
RENAMED = f"Into a room\n\n{MARK}\nwrite -> put\nthaw.store.packs.write -> thaw.store.room.packs.put\n"
LOOK = f"Look\n\n{MARK}\nread -> look\n"


def git(*words: str, check: bool = True) -> str:
    options = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *options, *words], check=check, capture_output=True, text=True).stdout.strip()


def commit(message: str, files: Mapping[str, str | None]) -> str:
    """In the working directory: what the files hold, or that they are gone."""
    for name, text in files.items():
        if text is None:
            Path(name).unlink(missing_ok=True)
        else:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(text)
    git("add", "-A")
    git("commit", "-q", "--allow-empty", "-m", message)
    return git("rev-parse", "HEAD")


@pytest.fixture
def root(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project, and the receipt of its soak."""
    pytester.makeini("[pytest]\nmarkers =\n  slow\n  model\n  all_cores\n  soak\n  longer_in_soak\n")
    monkeypatch.setenv("THAW_SOAK", "1")
    for name in ("THAW_RECEIPTS_DIR", "THAW_SUITE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(record_moves, "ROOT", pytester.path)
    git("init", "-q", "-b", "main")
    commit("First", {".gitignore": "__pycache__\n", **FILES})
    plugins = ("-p", "tiers", "-p", "soak_writer", "-p", "no:cacheprovider")
    assert pytester.runpytest_inprocess("-q", *plugins, "tests").ret == 0
    commit("Receipt", {})
    return pytester.path


def wrong(root: Path) -> dict[str, str]:
    return problems(root, groups(root))


def test_a_recorded_move_leaves_receipts_fresh_and_an_unrecorded_one_does_not(root: Path) -> None:
    assert wrong(root) == {}
    moved = commit(RENAMED, INTO_A_ROOM)
    assert wrong(root) == {"kills": "src/thaw/store changed since"}
    assert record_moves.main([moved]) == 0
    assert wrong(root) == {} and record_moves.check(root) == []
    commit("A change", {ROOM: "def put(blob):\n    return 0\n"})
    assert wrong(root) == {"kills": "src/thaw/store changed since"}


def test_moves_are_followed_one_after_the_other(root: Path) -> None:
    """A chain that lacks one leads nowhere."""
    made = [commit(RENAMED, INTO_A_ROOM), commit(LOOK, {INDEX: str(INTO_A_ROOM[INDEX]).replace("read", "look")})]
    assert record_moves.main(made) == 0 and wrong(root) == {}
    both = recorded_moves.read(root)
    assert [move.subject for move in both] == ["Into a room", "Look"]
    for kept in both:
        recorded_moves.write(root, [kept])
        assert "kills" in wrong(root)


def test_what_the_test_imports_may_move_as_well(root: Path) -> None:
    helper = "WHERE = 'thaw.store.packs.write'\n"
    moved = commit(f"A helper\n\n{MARK}\nPLACE -> WHERE\n", {"tests/store/leaks.py": helper})
    assert wrong(root)["kills"].startswith("a law or helper that its tests import changed since")
    assert record_moves.main([moved]) == 0 and wrong(root) == {}


@pytest.mark.parametrize(
    ("message", "file", "old", "new", "said"),
    [
        (RENAMED, ROOM, "+ 1", "+ 2", "gained: def put(blob):\n    return len(blob) + 2"),
        (RENAMED, INDEX, "return put", "return put()", "lost: def read():\n    return put"),
        (RENAMED.replace(MARK, ""), INDEX, "", "", "no line 'Moves code only.'"),
        (RENAMED.replace("write -> put", ""), INDEX, "", "", "lost: def write(blob):"),
    ],
)
def test_a_commit_that_changes_more_is_refused(
    root: Path, message: str, file: str, old: str, new: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = commit(message, INTO_A_ROOM | {file: str(INTO_A_ROOM[file]).replace(old, new)})
    assert record_moves.main([made]) == 1 and said in capsys.readouterr().out
    assert recorded_moves.read(root) == () and "kills" in wrong(root)


def test_data_that_is_changed_is_no_move(root: Path) -> None:
    made = commit(f"Data\n\n{MARK}\n", {"src/thaw/data/a.bin": "y"})
    assert record_moves.main([made]) == 1 and wrong(root) == {"kills": "src/thaw/data changed since"}


def test_what_is_recorded_by_hand_is_found_out(root: Path) -> None:
    made = commit("A change", {PACKS: "def write(blob):\n    return 0\n"})
    with record_moves.tree_of(f"{made}~") as before, record_moves.tree_of(made) as after:
        digests = record_moves.digests(before, after, groups(before))
    recorded_moves.write(root, [recorded_moves.Move("A change", digests)])
    assert wrong(root) == {} and record_moves.main(["--check"]) == 1
    assert record_moves.check(root) == ["A change: is not what that commit moved"]


def test_code_moves_to_where_it_is_covered_or_not_at_all(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """First an empty package that is covered, then the move into it."""
    out: dict[str, str | None] = {PACKS: None, "src/thaw/room/packs.py": WRITE}
    made = commit(f"Out\n\n{MARK}\n", out)
    assert record_moves.main([made]) == 1
    assert "kills no longer covers: def write(blob):" in capsys.readouterr().out
    git("reset", "-q", "--hard", "HEAD~")
    covers = SOAK.replace("COVERS", ", covers=('src/thaw/store', 'src/thaw/data', 'src/thaw/room')")
    commit("Room", {"src/thaw/room/__init__.py": '"""A room."""\n', "tests/store/test_a.py": covers})
    assert wrong(root) == {}
    made = commit(f"Out\n\n{MARK}\n", out)
    assert wrong(root)["kills"].startswith("it is of src/thaw/store src/thaw/data")
    assert record_moves.main([made]) == 0 and wrong(root) == {}
    commit("More", {"src/thaw/room/more.py": "x = 1\n"})
    assert "kills" in wrong(root)


def test_a_merge_of_moves_is_recorded_by_itself(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What both sides moved is a third state of the folder. What is not covered may differ."""
    git("checkout", "-q", "-b", "side")
    commit(RENAMED, INTO_A_ROOM)
    commit("Not covered", {"src/thaw/cli.py": "x = 1\n"})
    git("checkout", "-q", "main")
    assert record_moves.main([commit(LOOK, {INDEX: READ.replace("read", "look")})]) == 0
    commit("Recorded", {})
    both = INTO_A_ROOM | {INDEX: str(INTO_A_ROOM[INDEX]).replace("read", "look")}
    for file, refused in ({"src/thaw/store/new.py": "y = 1\n"}, 1), ({}, 0):
        git("merge", "-q", "--no-commit", "side", check=False)
        merged = commit("Merge side", both | file)
        assert len(git("show", "-s", "--format=%P", merged).split()) == 2
        assert "kills" in wrong(root) and record_moves.main([merged]) == refused
        assert bool(wrong(root)) == bool(refused)
        if refused:
            git("reset", "-q", "--hard", "HEAD~")
    assert "kills covers anew: y = 1" in capsys.readouterr().out
    assert record_moves.check(root) == []


@pytest.mark.slow("compares the trees before and after each recorded commit")
def test_the_recorded_moves_of_this_repository_are_what_its_commits_moved() -> None:
    """Where it has its history: not in an archive of it."""
    if not (record_moves.ROOT / ".git").exists():
        pytest.skip("no history")
    assert record_moves.check(record_moves.ROOT) == []
