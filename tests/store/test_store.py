"""The store's laws: what was committed is there, writing is all or nothing, refs move by compare-and-swap."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from store_sessions import MODEL, commit, folder_bytes, put_session, read_all, tokens

from thaw.core.errors import BadPoint, Conflict, CorruptBlob, CorruptDatabase, InvalidRequest, NotFound, RefConflict
from thaw.core.ids import CommitId, ObjectId
from thaw.core.objects import Commit, Segment, SegmentEntry, SegmentNode, State
from thaw.core.prefix import chains
from thaw.store import RefUpdate, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.init(tmp_path / "repo")


def test_a_commit_that_returned_is_there_for_another_process(store: Store) -> None:
    identifier = commit(store, tokens(600))
    store.close()
    again = Store.open(store.path)
    assert again.ref("main").target == identifier
    assert read_all(again, identifier) == 599 * 2 * 2 * 2 * 4 * 4
    assert list(again.commits()) == [identifier]
    assert again.uuid == store.uuid


def test_a_second_commit_writes_only_what_is_new(store: Store) -> None:
    first = commit(store, tokens(3000))
    before = folder_bytes(store.packs)
    second = commit(store, tokens(3010), base=first, parents=(first,))
    new = folder_bytes(store.packs) - before
    assert new < before / 10
    assert read_all(store, second) > read_all(store, first)


def test_the_same_session_twice_is_stored_once(store: Store) -> None:
    commit(store, tokens(600), branch="a")
    before = sorted(os.listdir(store.packs))
    commit(store, tokens(600), branch="b")
    new = set(os.listdir(store.packs)) - set(before)
    assert len(new) == 1, "only the commit object is new; the pack of known blobs is dropped"


def test_files_are_for_their_owner_only(store: Store) -> None:
    commit(store, tokens(10))
    for path in [store.path, store.packs]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in [*store.packs.iterdir(), *(p for p in store.path.iterdir() if p.is_file())]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_what_makes_a_commit_visible_is_synced(store: Store) -> None:
    """SQLite's own word for it: with a write-ahead log, FULL (2) syncs that at every commit; NORMAL (1) does not."""
    for durable, level in ((True, 2), (False, 1)):
        with store.database.write(durable=durable) as connection:
            assert connection.execute("PRAGMA synchronous").fetchone() == (level,)
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_leaving_without_commit_leaves_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError), store.begin() as tx:
        tx.put(put_session(tx, store, tokens(300)))
        raise RuntimeError("the engine failed")
    assert list(store.packs.iterdir()) == []
    assert list(store.commits()) == []
    assert store.gc().orphans_removed == 0


def test_objects_come_back_equal_and_of_the_asked_kind(store: Store) -> None:
    identifier = commit(store, tokens(300))
    value = store.get_as(identifier, Commit)
    state = store.get_as(value.state, State)
    assert state.tail_tokens == tokens(300)[-1:]
    with pytest.raises(CorruptBlob, match="a Segment was expected"):
        store.get_as(identifier, Segment)
    with pytest.raises(NotFound):
        store.get("b3:" + "0" * 64)


def test_commits_are_found_by_prefix_and_other_objects_are_not(store: Store) -> None:
    identifier = commit(store, tokens(300))
    assert store.find(identifier[3:7]) == [identifier]
    assert store.find(identifier[:9]) == [identifier]
    assert store.find(store.get_as(identifier, Commit).state[3:20]) == []
    for bad in ("abc", "xyzw", "", "../..", "a" * 65):
        with pytest.raises(InvalidRequest):
            store.find(bad)


def test_segments_are_found_by_the_hash_before_their_window(store: Store) -> None:
    identifier = commit(store, tokens(600))
    state = store.get_as(identifier, Commit).state
    model = store.get_as(state, State).model
    for number, window in enumerate(chains(model, tokens(600))):
        ((segment, holder),) = store.find_segments(window)
        assert store.get_as(segment, Segment).start == number * 256
        assert holder == state
    assert store.find_segments("b3:" + "1" * 64) == []


def test_a_reference_to_nothing_is_refused(store: Store) -> None:
    with store.begin() as tx, pytest.raises(Conflict, match="not in the repository"):
        tx.put(SegmentNode(entries=(SegmentEntry(segment="b3:" + "2" * 64, start=0, length=1),)))
        tx.commit()
    assert list(store.packs.iterdir()) == []


def test_an_object_that_could_not_be_read_again_is_not_stored(store: Store) -> None:
    with store.begin() as tx, pytest.raises(InvalidRequest, match="cannot be read again"):
        tx.put(Commit(state="b3:" + "2" * 64, parents=(), message="", time_ns=1))  # type: ignore[arg-type]


def test_a_pack_that_is_not_as_announced_is_refused(store: Store) -> None:
    with store.begin() as tx:
        with pytest.raises(InvalidRequest, match="not leased"):
            tx.add_pack("x.safetensors", 1, [])
        put_session(tx, store, tokens(300))
        with pytest.raises(CorruptBlob, match="announced"):
            tx.add_pack(tx.pack, 12, [])


def test_a_ref_moves_only_from_where_it_is_expected(store: Store) -> None:
    first = commit(store, tokens(300), expect=None)
    with pytest.raises(RefConflict, match="exists already"):
        commit(store, tokens(310), expect=None)
    second = commit(store, tokens(320), expect=first, parents=(first,))
    with pytest.raises(RefConflict, match="somebody else moved it"):
        store.update_refs(RefUpdate("main", "branch", None, first, "delete"))
    assert store.ref("main").target == second


def test_a_lost_race_keeps_the_commit(store: Store) -> None:
    first = commit(store, tokens(300))
    with pytest.raises(RefConflict) as raised:
        commit(store, tokens(310), expect="b3:" + "9" * 64, parents=(first,))
    (kept,) = [entry for entry in store.reflog("main", kept=True) if not entry.moved]
    assert str(kept.new)[3:13] in str(raised.value)
    assert [entry.new for entry in store.reflog("main")] == [first]
    store.gc()
    assert read_all(store, kept.new) > 0


def test_ref_updates_are_all_or_none(store: Store) -> None:
    first = commit(store, tokens(300))
    with pytest.raises(RefConflict):
        store.update_refs(RefUpdate("a", "branch", first, None, "r"), RefUpdate("main", "branch", first, None, "r"))
    assert store.ref("a") is None
    store.update_refs(RefUpdate("a", "branch", first, None, "r"), RefUpdate("t", "tag", first, None, "r"))
    assert [(r.name, r.kind) for r in store.refs()] == [("a", "branch"), ("main", "branch"), ("t", "tag")]
    assert [r.name for r in store.refs("tag")] == ["t"]


def test_a_ref_names_a_stored_commit_by_a_valid_name(store: Store) -> None:
    first = commit(store, tokens(300))
    for name in ("../x", "", "a b", "x.lock"):
        with pytest.raises(BadPoint):
            store.update_refs(RefUpdate(name, "branch", first, "any", "r"))
    with pytest.raises(NotFound):
        store.update_refs(RefUpdate("x", "branch", CommitId(ObjectId("b3:" + "3" * 64)), "any", "r"))
    with pytest.raises(InvalidRequest, match="is a branch already"):
        store.update_refs(RefUpdate("main", "tag", first, "any", "r"))


def test_the_reflog_tells_every_move_newest_first(store: Store) -> None:
    first = commit(store, tokens(300))
    second = commit(store, tokens(310))
    store.update_refs(RefUpdate("main", "branch", first, second, "back"))
    store.update_refs(RefUpdate("main", "branch", None, first, "gone"))
    moves = [(entry.old, entry.new, entry.reason) for entry in store.reflog("main")]
    assert moves == [(first, None, "gone"), (second, first, "back"), (first, second, "commit"), (None, first, "commit")]


def test_head_and_settings_last(store: Store) -> None:
    assert store.head == "main"
    store.set_head("other")
    store.set_setting("model", '"/models/x"')
    again = Store.open(store.path)
    assert (again.head, again.get_setting("model"), again.get_setting("none")) == ("other", '"/models/x"', None)


def test_init_never_takes_over_what_is_there(store: Store, tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="already"):
        Store.init(store.path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    with pytest.raises(Conflict, match="not empty"):
        Store.init(tmp_path / "full")
    with pytest.raises(NotFound, match="thaw init"):
        Store.open(tmp_path / "nowhere")


def test_a_repository_without_its_database_says_how_to_rebuild(store: Store) -> None:
    store.close()
    (store.path / "thaw.db").unlink()
    with pytest.raises(CorruptDatabase, match="thaw fsck --rebuild"):
        Store.open(store.path)


def test_equal_models_are_one_object(store: Store) -> None:
    with store.begin() as tx:
        first = tx.put(MODEL)
        tx.commit()
    with store.begin() as tx:
        assert tx.put(MODEL) == first
        tx.commit()
    assert len(list(store.packs.iterdir())) == 1


def test_a_closed_store_says_so(store: Store) -> None:
    store.close()
    with pytest.raises(Conflict, match="closed"):
        store.refs()
