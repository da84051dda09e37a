"""The tools that repair survive whatever SQLite and a folder can hold: fsck, fsck --rebuild, gc and opening raise only
thaw's errors, end, and what is whole is there afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_sessions import commit, read_all, tokens

from thaw.core.errors import CorruptDatabase, Damaged, ThawError
from thaw.store import RefUpdate, Store, backup, fsck, refslog
from thaw.store.schema import TABLES, check, checksum

VALUES = (None, 0, -1, 1 << 62, 1.5, float("inf"), "", "text", "b3:" + "0" * 64, b"", b"\xff\xfe", '["a"]', "[" * 5000)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("hostile") / "repo"
    with Store.init(path) as store:
        first = commit(store, tokens(300))
        commit(store, tokens(520), base=first, parents=(first,), branch="other")
        store.update_refs(RefUpdate("v1", "tag", first, None, "tag"))
        store.set_setting("engine", "fake")
    return path, first


@pytest.fixture
def repo(sound: tuple[Path, str], tmp_path: Path) -> tuple[Path, str]:
    shutil.copytree(sound[0], tmp_path / "repo")
    return tmp_path / "repo", sound[1]


def columns() -> list[tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        for statement in TABLES:
            connection.execute(statement)
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        found = [(t, row[1]) for t in tables for row in connection.execute(f"PRAGMA table_info({t})")]
    return [(table, column) for table, column in found if table != "sqlite_sequence"]


def unconstrained(path: Path, change: str, *values: object) -> None:
    """Runs a statement on the database after every table was made anew without types, keys and NOT NULL."""
    with contextlib.closing(sqlite3.connect(path / "thaw.db", isolation_level=None)) as connection:
        tables = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name != 'sqlite_sequence'"
        for (table,) in connection.execute(tables).fetchall():
            connection.execute(f"CREATE TABLE copied AS SELECT * FROM {table}")
            connection.execute(f"DROP TABLE {table}")
            connection.execute(f"ALTER TABLE copied RENAME TO {table}")
        connection.execute(change, values)


def everything(path: Path) -> None:
    """Every tool; only thaw's errors leave it."""
    for attempt in (
        lambda: _use(path),
        lambda: fsck(path),
        lambda: fsck(path, deep=False),
    ):
        with contextlib.suppress(ThawError):
            attempt()
    assert fsck(path, rebuild=True).ok


def _use(path: Path) -> None:
    with Store.open(path) as store:
        for use in (
            store.refs,
            lambda: store.reflog("main", kept=True),
            lambda: list(store.commits()),
            lambda: store.gc(dry_run=True),
            lambda: store.gc(keep_reflog_s=0),
            lambda: commit(store, tokens(40, seed=7), branch="more"),
        ):
            with contextlib.suppress(ThawError):
                use()


@pytest.mark.slow("repairs a repository many times")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(columns()), value=st.sampled_from(VALUES), all_rows=st.booleans())
def test_any_value_in_any_column_is_reported_and_repaired(
    sound: tuple[Path, str], place: tuple[str, str], value: object, all_rows: bool
) -> None:
    path = sound[0].with_name("copy")
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(sound[0], path)
    table, column = place
    which = "" if all_rows else f"WHERE rowid = (SELECT min(rowid) FROM {table})"
    unconstrained(path, f'UPDATE {table} SET "{column}" = ? {which}', value)
    everything(path)
    with Store.open(path) as store:
        read_all(store, sound[1])


@pytest.mark.parametrize("value", [None, b"\xff", 1.5, "text"], ids=repr)
@pytest.mark.parametrize("column", ["segment", "state"])
def test_any_value_in_the_segments_of_an_older_format_is_survived(tmp_path: Path, column: str, value: object) -> None:
    golden = Path(__file__).parents[1] / "golden" / "format-1"
    with Store.open(Path(shutil.copytree(golden, tmp_path / "sound"))) as store:
        refs = store.refs()
    path = Path(shutil.copytree(golden, tmp_path / "repo"))
    unconstrained(path, f"UPDATE segments SET {column} = ?", value)
    shutil.copytree(path, tmp_path / "opened")
    for one in (path, tmp_path / "opened"):
        if one != path:
            with Store.open(one) as store:
                assert store.refs() == refs
        assert not fsck(one).ok
        everything(one)
        with Store.open(one) as store:
            assert {ref.name: ref.target for ref in store.refs() if ref.name != "more"} == {
                ref.name: ref.target for ref in refs
            }


@pytest.mark.parametrize("table", sorted({table for table, _ in columns()}))
def test_a_row_of_nulls_is_reported_and_repaired(repo: tuple[Path, str], table: str) -> None:
    num = sum(of == table for of, _ in columns())
    unconstrained(repo[0], f"INSERT INTO {table} VALUES ({', '.join(['NULL'] * num)})")
    assert not fsck(repo[0]).ok
    everything(repo[0])


@pytest.mark.parametrize("table", sorted({table for table, _ in columns()}))
def test_a_lost_table_is_reported_and_repaired(repo: tuple[Path, str], table: str) -> None:
    with contextlib.closing(sqlite3.connect(repo[0] / "thaw.db")) as connection:
        connection.execute(f"DROP TABLE {table}")
    assert not fsck(repo[0], deep=False).ok
    everything(repo[0])


def test_rows_with_right_checksums_and_wrong_types_are_refused(repo: tuple[Path, str]) -> None:
    """Whoever writes the checksum too may still not crash a tool."""
    path, first = repo
    evil: tuple[tuple[str, tuple[object, ...]], ...] = (
        ("packs", (b"\xff", 1, None, check("packs", repr(b"\xff"), 1, None))),
        ("packs", ("../../x", -5, None, check("packs", "../../x", -5, None))),
        ("refs", (17, "branch", first, checksum("refs", 17, "branch", first))),
        ("refs", ("x", "kind", first, checksum("refs", "x", "kind", first))),
        ("settings", ("user.x", 5, checksum("settings", "user.x", 5))),
    )
    for table, row in evil:
        copy = path.with_name("evil")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(path, copy)
        unconstrained(copy, f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", *row)
        everything(copy)


def test_an_object_of_right_hash_and_wrong_form_is_refused(repo: tuple[Path, str]) -> None:
    from blake3 import blake3

    for data in (b'{"type":"thaw.state/1","model":[[]],"nodes":[[1]],"turn_nodes":{}}', b"[" * 9000, b"{}", b"\xff"):
        identifier = "b3:" + blake3(data).hexdigest()
        with contextlib.closing(sqlite3.connect(repo[0] / "thaw.db", isolation_level=None)) as connection:
            connection.execute(
                "INSERT OR IGNORE INTO objects (id, kind, data, pack, start) VALUES (?, 'state', ?, 'p', 0)",
                (identifier, data),
            )
    with Store.open(repo[0]) as store, pytest.raises(Damaged):
        store.get(identifier)
    assert not fsck(repo[0]).ok
    everything(repo[0])


@pytest.mark.parametrize("name", ["stray", "a.safetensors", "b.safetensors.tmp"])
def test_a_folder_among_the_packs_is_named_and_stops_nothing(repo: tuple[Path, str], name: str) -> None:
    path, first = repo
    (path / "packs" / name / "inside").mkdir(parents=True)
    with Store.open(path) as store:
        assert store.gc(dry_run=True).strangers == (name,)
        assert store.gc().strangers == (name,)
        commit(store, tokens(40, seed=3), branch="more")
        assert store.gc().strangers == (name,)
        read_all(store, first)
    assert fsck(path).ok and fsck(path, rebuild=True).ok
    assert (path / "packs" / name / "inside").is_dir(), "what is not thaw's is not removed"


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "device", "loop"])
@pytest.mark.parametrize("where", ["indexed", "stray", "refs.json", "refs.log", "refs.lock", "gc.lock"])
def test_what_is_no_file_is_never_waited_for(repo: tuple[Path, str], kind: str, where: str) -> None:
    path, _ = repo
    (old, *_) = sorted((path / "packs").iterdir())
    place = {"indexed": old, "stray": path / "packs" / "x.safetensors"}.get(where, path / where)
    place.unlink(missing_ok=True)
    _make(kind, place)
    for deep in (True, False):
        report = fsck(path, deep=deep)
        assert report.ok == (where not in ("indexed", "refs.json", "refs.log"))
    with contextlib.suppress(ThawError), Store.open(path) as store:
        store.gc()
    with contextlib.suppress(ThawError):
        fsck(path, rebuild=True)


@pytest.mark.slow("repairs a repository many times")
@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "device", "loop"])
@pytest.mark.parametrize(
    "name",
    [
        "refs.json", "refs.json.tmp", "refs.log", "thaw.db", "thaw.db-journal", "thaw.db-shm", "thaw.db-wal",
        "thaw.db.new", "thaw.db.new-journal", "thaw.db.new-wal",
    ],
)  # fmt: skip
def test_what_is_no_file_makes_way_for_one(repo: tuple[Path, str], kind: str, name: str) -> None:
    """Nothing waits for it, a rebuild makes all whole, and what lies in a folder is still there."""
    path, first = repo
    with Store.open(path) as store:
        refs = store.refs()
    (path / name).unlink(missing_ok=True)
    _make(kind, path / name)
    if kind == "folder":
        (path / name / "inside").touch()
    with warnings.catch_warnings(), contextlib.suppress(ThawError):
        warnings.simplefilter("ignore", RuntimeWarning)
        with Store.open(path) as store:
            store.set_setting("key", "value")
            store.gc()
    if name.startswith("thaw.db.new"):
        unconstrained(path, "DELETE FROM packs")
    for deep in (True, False):
        fsck(path, deep=deep)
    assert fsck(path, rebuild=True).ok
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with Store.open(path) as store:
            assert store.refs() == refs
            read_all(store, first)
            second = commit(store, tokens(40, seed=3), branch="more")
    assert fsck(path).ok and b'"more"' in (path / "refs.json").read_bytes()
    with Store.open(path) as store:
        read_all(store, second)
    assert len(list(path.rglob("inside"))) == (kind == "folder")


def test_the_backup_is_never_longer_than_what_is_read_again(
    repo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, first = repo
    monkeypatch.setattr(backup, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(backup, "REASONS", 1 << 17)
    with Store.open(path) as store:
        for number in range(8):
            store.update_refs(RefUpdate(f"b{number}", "branch", first, None, "why " * (1 << 13)))
        saved, _ = refslog.read(path)
        assert saved is not None and 0 < len(saved.reflog) <= 4 and len(saved.refs) == len(store.refs())
        with pytest.warns(RuntimeWarning, match=r"refs\.json would have .* bytes, and no more than 1,048,576"):
            store.set_setting("large", "x" * (1 << 20))
        assert store.get_setting("large") == "x" * (1 << 20)
        assert refslog.read(path) == (saved, True)
        assert fsck(path).ok
        store.set_setting("large", "small")
        assert fsck(path).ok
    for file in path.glob("thaw.db*"):
        file.unlink()
    assert fsck(path, rebuild=True).ok


def _make(kind: str, place: Path) -> None:
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "loop":
        place.symlink_to(place.name)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    else:
        import socket

        folder = os.open(place.parent, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(f"/proc/self/fd/{folder}/{place.name}")
        os.close(folder)


def test_gc_unlinks_no_pack_that_rows_point_into(repo: tuple[Path, str]) -> None:
    """A pack doomed by damage, with a check that holds."""
    path, first = repo
    with contextlib.closing(sqlite3.connect(path / "thaw.db", isolation_level=None)) as connection:
        for name, nbytes in connection.execute("SELECT name, nbytes FROM packs").fetchall():
            row = (1, check("packs", name, nbytes, 1), name)
            connection.execute('UPDATE packs SET doomed_ns = ?, "check" = ? WHERE name = ?', row)
    with Store.open(path) as store:
        with pytest.raises(CorruptDatabase, match="rows point into it"):
            store.gc()
        read_all(store, first)
    assert not fsck(path).ok and fsck(path, rebuild=True).ok
