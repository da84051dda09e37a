"""Damage: a flipped bit in any file, a cut or missing pack, a lost or corrupt database are detected and named; a
rebuild restores what can be restored; an untouched snapshot still opens."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_sessions import commit, kv, read_all, tokens

from thaw.core.errors import CorruptBlob, CorruptDatabase, NewerFormat, NotFound, ThawError
from thaw.core.ids import digest
from thaw.core.objects import Commit
from thaw.store import FsckReport, Ref, RefUpdate, Store, backup, fsck
from thaw.store.schema import checksum

_QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def repo(tmp_path: Path) -> tuple[Path, list[str]]:
    """Two sessions on `main` and one, of other tokens, on `other`; a tag; closed."""
    path = tmp_path / "repo"
    with Store.init(path) as store:
        first = commit(store, tokens(300))
        second = commit(store, tokens(520), base=first, parents=(first,))
        third = commit(store, tokens(270, seed=1), branch="other")
        store.update_refs(RefUpdate("v1", "tag", first, None, "tag"))
        store.set_setting("model", '"m"')
    return path, [first, second, third]


def contents(path: Path) -> dict[str, object]:
    """All that a repository means: refs, reflogs, settings, objects, and KV read through them."""
    with Store.open(path) as store:
        commits = sorted(store.commits())
        return {
            "refs": store.refs(),
            "reflogs": [store.reflog(name, kept=True) for name in ("main", "other", "v1")],
            "settings": (store.head, store.get_setting("model"), store.uuid),
            "commits": [store.get_as(one, Commit) for one in commits],
            "kv": [read_all(store, one) for one in commits],
        }


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_a_sound_repository_has_no_problems(repo: tuple[Path, list[str]]) -> None:
    report = fsck(repo[0])
    assert (report.problems, report.exit_code, report.num_commits) == ([], 0, 3)
    assert report.nbytes == sum(file.stat().st_size for file in (repo[0] / "packs").iterdir())


@pytest.mark.slow("reads a repository many times")
@settings(_QUICK, max_examples=150)
@given(data=st.data())
def test_a_flipped_bit_in_any_file_is_detected_or_changes_nothing(
    repo: tuple[Path, list[str]], data: st.DataObject
) -> None:
    """In packs and refs.json every bit counts. SQLite's file also has bytes that mean nothing (free space)."""
    path = repo[0]
    copy = path.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy)
    files = sorted(file for file in copy.rglob("*") if file.is_file() and file.stat().st_size)
    file = data.draw(st.sampled_from(files))
    flip(file, data.draw(st.integers(0, file.stat().st_size * 8 - 1)))
    report = fsck(copy) if file.name != "thaw.db" else _fsck_or_newer(copy)
    if report is None:
        return
    if report.ok:
        assert file.name == "thaw.db"
        assert contents(copy) == contents(path)
    else:
        assert report.exit_code == 5
        named = {problem.file for problem in report.problems}
        assert str(file.relative_to(copy)) in named or "thaw.db" in named


def _fsck_or_newer(path: Path) -> FsckReport | None:
    try:
        return fsck(path)
    except NewerFormat:
        return None


@pytest.mark.slow("reads a repository many times")
@_QUICK
@given(data=st.data())
def test_a_damaged_repository_raises_only_our_errors(repo: tuple[Path, list[str]], data: st.DataObject) -> None:
    """Bytes of the database overwritten at will; then everything is tried."""
    copy = repo[0].with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(repo[0], copy)
    size = (copy / "thaw.db").stat().st_size
    with open(copy / "thaw.db", "r+b") as file:
        file.seek(data.draw(st.integers(0, size - 1)))
        file.write(data.draw(st.binary(min_size=1, max_size=600)))
    for attempt in (
        lambda: contents(copy),
        lambda: fsck(copy),
        lambda: _open_and_gc(copy),
        lambda: fsck(copy, rebuild=True),
    ):
        with contextlib.suppress(ThawError):
            attempt()


def _open_and_gc(path: Path) -> None:
    with Store.open(path) as store:
        store.gc()


def test_a_flipped_bit_in_a_blob_names_pack_blob_and_commits(repo: tuple[Path, list[str]]) -> None:
    path, (first, second, third) = repo
    with Store.open(path) as store:
        place = store.locate([digest(kv(tokens(520), 0, 256, 1))])
        (place,) = place.values()
    flip(path / "packs" / place.pack, (place.offset + 5) * 8)
    report = fsck(path)
    (problem,) = report.problems
    assert problem.file == f"packs/{place.pack}"
    assert problem.ids == (place.blob,)
    assert problem.commits == (first,) or problem.commits == tuple(sorted((first, second)))
    with Store.open(path) as store:
        assert read_all(store, third) > 0, "an untouched snapshot still opens"
        with pytest.raises(CorruptBlob, match=place.blob):
            read_all(store, first)


def test_a_missing_pack_is_named_with_its_commits(repo: tuple[Path, list[str]]) -> None:
    path, (_, _, third) = repo
    with Store.open(path) as store:
        before = set(os.listdir(store.packs))
        fourth = commit(store, tokens(300, seed=4), branch="fourth")
        (gone, *_) = sorted(
            set(os.listdir(store.packs)) - before, key=lambda name: -(store.packs / name).stat().st_size
        )
        (store.packs / gone).unlink()
    report = fsck(path)
    (problem,) = report.problems
    assert problem.file == f"packs/{gone}" and problem.commits == (fourth,) and "missing" in problem.what
    with Store.open(path) as store:
        read_all(store, third)
        with pytest.raises(CorruptBlob, match=gone):
            read_all(store, fourth)


@_QUICK
@given(cut=st.floats(0, 1, exclude_max=True), which=st.integers(0, 5))
def test_a_truncated_pack_is_named(repo: tuple[Path, list[str]], cut: float, which: int) -> None:
    copy = repo[0].with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(repo[0], copy)
    packs = sorted((copy / "packs").iterdir())
    pack = packs[which % len(packs)]
    os.truncate(pack, int(pack.stat().st_size * cut))
    report = fsck(copy, deep=False)
    assert f"packs/{pack.name}" in {problem.file for problem in report.problems}
    assert all(problem.commits for problem in report.problems)


@pytest.mark.parametrize("without_backup", [False, True])
def test_a_lost_database_is_rebuilt(repo: tuple[Path, list[str]], without_backup: bool) -> None:
    path, (first, second, third) = repo
    before = contents(path)
    (path / "thaw.db").unlink()
    if without_backup:
        (path / "refs.json").unlink()
    with pytest.raises(CorruptDatabase, match=r"lost its database.*--rebuild"):
        Store.open(path)
    report = fsck(path, rebuild=True)
    assert report.ok and report.rebuilt and report.repaired
    after = contents(path)
    assert after["commits"] == before["commits"] and after["kv"] == before["kv"]
    if without_backup:
        assert after["refs"] == [Ref("main", "branch", second), Ref("other", "branch", third)], (
            "by their commits' hints"
        )
    else:
        assert after == before
    with Store.open(path) as store:
        commit(store, tokens(600), base=second, parents=(second,), expect=second)
        store.gc()
        read_all(store, first)


def test_the_lookup_of_prefixes_is_rebuilt(repo: tuple[Path, list[str]]) -> None:
    def rows() -> list[tuple[str, str, bytes]]:
        with sqlite3.connect(repo[0] / "thaw.db") as connection:
            return connection.execute('SELECT segment, "window", "key" FROM segments ORDER BY segment').fetchall()

    before = rows()
    (repo[0] / "thaw.db").unlink()
    assert fsck(repo[0], rebuild=True).ok
    assert rows() == before and before


def test_a_corrupt_database_is_rebuilt_and_kept_aside(repo: tuple[Path, list[str]]) -> None:
    path, _ = repo
    before = contents(path)
    (path / "thaw.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(CorruptDatabase, match="--rebuild"):
        Store.open(path)
    assert fsck(path).problems[0].file == "thaw.db"
    assert fsck(path, rebuild=True).ok
    assert contents(path) == before
    assert len(list(path.glob("thaw.db.damaged-*"))) == 1


def test_a_ref_changed_behind_our_back_is_detected_and_restored(repo: tuple[Path, list[str]]) -> None:
    path, (first, second, _) = repo
    with sqlite3.connect(path / "thaw.db") as connection:
        connection.execute("UPDATE refs SET target = ? WHERE name = 'main'", (first,))
    with Store.open(path) as store, pytest.raises(CorruptDatabase, match="'main'"):
        store.ref("main")
    assert fsck(path, rebuild=True).ok
    with Store.open(path) as store:
        assert store.ref("main").target == second


def test_a_database_that_lost_changes_is_detected(repo: tuple[Path, list[str]]) -> None:
    """An old copy put back, or a write-ahead log that was thrown away."""
    path, _ = repo
    shutil.copy(path / "thaw.db", path / "old")
    with Store.open(path) as store:
        fourth = commit(store, tokens(290), branch="new")
    os.replace(path / "old", path / "thaw.db")
    with pytest.raises(CorruptDatabase, match="lost some"):
        Store.open(path)
    assert fsck(path, rebuild=True).ok
    with Store.open(path) as store:
        assert store.ref("new").target == fourth
        read_all(store, fourth)


def test_a_lost_or_damaged_backup_is_written_again(repo: tuple[Path, list[str]]) -> None:
    path, _ = repo
    before = contents(path)
    for damage in ((path / "refs.json").unlink, lambda: flip(path / "refs.json", 4000)):
        damage()
        assert [problem.file for problem in fsck(path).problems] == ["refs.json"]
        report = fsck(path, rebuild=True)
        assert report.ok and not report.rebuilt and report.repaired
        assert contents(path) == before


def test_a_commit_newer_than_the_backup_is_found_by_its_hint(repo: tuple[Path, list[str]]) -> None:
    path, (_, second, _) = repo
    saved = (path / "refs.json").read_bytes()
    with Store.open(path) as store:
        fourth = commit(store, tokens(600), base=second, parents=(second,))
        store.update_refs(RefUpdate("gone", "branch", second, None, "made"))
    (path / "refs.json").write_bytes(saved)
    (path / "thaw.db").unlink()
    assert fsck(path, rebuild=True).ok
    with Store.open(path) as store:
        assert store.ref("main").target == fourth
        assert store.ref("gone") is None


def test_a_branch_that_was_moved_back_stays_back(repo: tuple[Path, list[str]]) -> None:
    path, (first, second, _) = repo
    with Store.open(path) as store:
        store.update_refs(RefUpdate("main", "branch", first, second, "back"))
    (path / "thaw.db").unlink()
    assert fsck(path, rebuild=True).ok
    with Store.open(path) as store:
        assert store.ref("main").target == first


def test_a_branch_whose_commit_is_lost_goes_back_to_one_that_is_there(repo: tuple[Path, list[str]]) -> None:
    path, (first, second, _) = repo
    with sqlite3.connect(path / "thaw.db") as connection:
        (pack,) = connection.execute("SELECT pack FROM objects WHERE id = ?", (second,)).fetchone()
    (path / "packs" / pack).unlink()
    (path / "thaw.db").unlink()
    report = fsck(path, rebuild=True)
    assert any("'main'" in note and second in note for note in report.notes)
    with Store.open(path) as store:
        assert store.ref("main").target == first
        read_all(store, first)


def test_objects_of_a_lost_pack_are_rescued_from_the_old_database(repo: tuple[Path, list[str]]) -> None:
    path, (first, second, _) = repo
    with sqlite3.connect(path / "thaw.db") as connection:
        (pack,) = connection.execute("SELECT pack FROM objects WHERE id = ?", (second,)).fetchone()
        connection.execute("UPDATE settings SET value = 'x' WHERE key = 'uuid'")
    (path / "packs" / pack).unlink()
    fsck(path, rebuild=True)
    with Store.open(path) as store:
        assert store.ref("main").target == second
        read_all(store, second)
        read_all(store, first)


def test_a_newer_database_is_refused(repo: tuple[Path, list[str]]) -> None:
    path, _ = repo
    with sqlite3.connect(path / "thaw.db") as connection:
        connection.execute("PRAGMA user_version = 5")
        value = (checksum("settings", "format", "5"),)
        connection.execute("UPDATE settings SET value = '5', checksum = ? WHERE key = 'format'", value)
    for attempt in (Store.open, fsck, lambda path: fsck(path, rebuild=True)):
        with pytest.raises(NewerFormat, match="written by a newer thaw"):
            attempt(path)


def test_a_newer_backup_is_refused_and_a_damaged_version_is_damage(repo: tuple[Path, list[str]]) -> None:
    data = (repo[0] / "refs.json").read_bytes().replace(b"thaw.refs/1", b"thaw.refs/3")
    with pytest.raises(CorruptDatabase, match="digest"):
        backup.decode(data)
    start = data.index(b"b3:") + 3
    zeroed = data[:start] + b"0" * 64 + data[start + 64 :]
    with pytest.raises(NewerFormat, match=r"refs\.json was written by a newer thaw"):
        backup.decode(zeroed.replace(b"0" * 64, digest(zeroed)[3:].encode(), 1))


def test_gc_removes_nothing_from_a_damaged_repository(repo: tuple[Path, list[str]]) -> None:
    path, (first, _, _) = repo
    with sqlite3.connect(path / "thaw.db") as connection:
        connection.execute("UPDATE objects SET data = data || ' ' WHERE id = ?", (first,))
    with Store.open(path) as store:
        before = os.listdir(store.packs)
        with pytest.raises(CorruptDatabase, match="thaw fsck"):
            store.gc(keep_reflog_s=0)
        assert os.listdir(store.packs) == before


def test_an_open_store_goes_on_after_a_rebuild(repo: tuple[Path, list[str]]) -> None:
    path, (first, second, _) = repo
    with Store.open(path) as store:
        assert store.ref("main").target == second
        (path / "thaw.db").rename(path / "lost")
        for suffix in ("-wal", "-shm"):
            (path / f"thaw.db{suffix}").unlink(missing_ok=True)
        assert store.fsck(rebuild=True).rebuilt
        assert store.ref("main").target == second
        read_all(store, first)


def test_nothing_is_not_a_repository(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        fsck(tmp_path)
