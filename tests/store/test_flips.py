"""A flipped bit in thaw.db never changes what is read: it is the same, or an error that says so, before fsck is asked.

Every bit of a byte counts the same here, so one of each byte is flipped, or a sample of them.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_sessions import commit, tokens

from thaw.core.errors import NotFound, ThawError
from thaw.repo import log as logs
from thaw.repo import resolve, undo
from thaw.repo import show as shows
from thaw.repo import stats as numbers
from thaw.store import RefUpdate, Store

SAMPLE = 150


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Branches that moved back and forth, so that rows of one name look much alike; a tag; a deleted branch."""
    path = tmp_path_factory.mktemp("flips") / "repo"
    with Store.init(path) as store:
        ids = [commit(store, tokens(30 + 9 * i, seed=i % 3), branch=f"b{i % 3}") for i in range(9)]
        for i in range(6):
            store.update_refs(RefUpdate("b0", "branch", ids[i], "any", f"adopt: {i}"))
            store.update_refs(RefUpdate("b1", "branch", ids[8 - i], "any", f"adopt: {i}"))
        store.update_refs(RefUpdate("v1", "tag", ids[0], None, "tag"))
        store.update_refs(RefUpdate("gone", "branch", ids[1], None, "made"))
        store.update_refs(RefUpdate("gone", "branch", None, ids[1], "deleted"))
        store.set_setting("engine", '{"name":"fake"}')
        store.set_head("b1")
    return path


def reads(store: Store) -> Iterator[tuple[str, Callable[[], object]]]:
    """What people read, each by itself: one that fails says nothing of the others."""
    yield "refs", store.refs
    yield "head", lambda: store.head
    yield "settings", lambda: (store.get_setting("engine"), store.get_setting("none"), store.uuid)
    yield "models", store.models
    yield "log", lambda: logs.log(store, logs.tips(store))
    yield "stats", lambda: numbers.stats(store).kv_nbytes
    for name in ("b0", "b1", "b2", "v1", "gone", "none"):
        yield f"ref {name}", lambda name=name: store.ref(name)
        yield f"reflog {name}", lambda name=name: store.reflog(name, kept=True)
        yield f"undo {name}", lambda name=name: undo.last_move(store.reflog(name))
        for point in (name, f"{name}@{{1}}", f"{name}@{{3}}", f"{name}@{{9}}"):
            yield point, lambda point=point: _resolved(store, point)
    for name in ("b0", "b1", "b2", "v1"):
        yield f"show {name}", lambda name=name: shows.show(store, resolve.resolve(store, name))


def _resolved(store: Store, point: str) -> object:
    try:
        return resolve.resolve(store, point)
    except NotFound as error:
        return str(error).partition(":")[0]


def _all(store: Store) -> dict[str, object]:
    return {what: read() for what, read in reads(store)}


def changed(path: Path, expected: dict[str, object]) -> list[str]:
    """What is read and differs, though nothing raised."""
    found = []
    try:
        with Store.open(path) as store:
            for what, read in reads(store):
                try:
                    value = read()
                except ThawError:
                    continue
                if value != expected[what]:
                    found.append(f"{what}: {value} instead of {expected[what]}")
    except ThawError:
        pass
    return found


def flips(path: Path, offsets: list[int]) -> list[str]:
    """Flips a bit of each of these bytes in turn; what was read wrongly, with the bit."""
    with Store.open(path) as store:
        expected = _all(store)
    copy = path.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy)
    whole = (path / "thaw.db").read_bytes()
    wrong = []
    for offset in offsets:
        for suffix in ("-wal", "-shm"):
            (copy / f"thaw.db{suffix}").unlink(missing_ok=True)
        bit = random.Random(offset).randrange(8)
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << bit
        (copy / "thaw.db").write_bytes(damaged)
        wrong += [f"byte {offset} bit {bit}: {what}" for what in changed(copy, expected)]
    return wrong


def used(path: Path) -> list[int]:
    """Bytes of the database that are not in a run of zeros."""
    whole = (path / "thaw.db").read_bytes()
    return [i for i in range(len(whole)) if any(whole[max(0, i - 4) : i + 5])]


def test_a_flipped_bit_of_the_database_is_an_error_or_changes_nothing_that_is_read(repo: Path) -> None:
    offsets = random.Random(8).sample(used(repo), SAMPLE)
    assert flips(repo, sorted(offsets)) == []


@pytest.mark.soak("a bit of every byte of a database in turn", receipt="database-flips")
@pytest.mark.timeout(3600)
def test_a_bit_of_every_byte_of_the_database(repo: Path, soak_receipt: Callable[..., None]) -> None:
    offsets = used(repo)
    wrong = flips(repo, offsets)
    assert wrong == []
    soak_receipt(
        what="a bit of every byte of a database flipped in turn, and everything read",
        held="what was read was the same, or an error said so",
        counts={"flips": len(offsets)},
    )


def test_what_a_state_weighs_and_who_recorded_it_are_read_with_their_check(repo: Path) -> None:
    """The negative control: these rows say something that no hash covers."""
    import sqlite3

    copy = repo.with_name("control")
    shutil.copytree(repo, copy)
    for change in ("UPDATE blobs SET nbytes = nbytes + 1", "UPDATE objects SET state = upper(state)",
                   "UPDATE reflog SET seq = -seq", "DELETE FROM reflog_ends"):  # fmt: skip
        shutil.copy(repo / "thaw.db", copy / "thaw.db")
        connection = sqlite3.connect(copy / "thaw.db")
        connection.execute(change)
        connection.commit()
        connection.close()
        for suffix in ("-wal", "-shm"):
            if os.path.exists(f"{copy}/thaw.db{suffix}"):
                os.unlink(f"{copy}/thaw.db{suffix}")
        with Store.open(copy) as store:
            failed = 0
            for _, read in reads(store):
                try:
                    read()
                except ThawError:
                    failed += 1
        assert failed, change
