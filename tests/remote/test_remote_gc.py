"""gc of a remote: what is reached stays, what is not goes after the grace period, and no push loses its data to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hosts import commit, files, read_all, remote, tokens, wish
from movers import move_at_once

from thaw.core.errors import Busy, CorruptBlob, RefConflict, RemoteError
from thaw.remote import epochs, layout, refs
from thaw.remote.bucket import FoundObject, Version
from thaw.remote.fetch import fetch
from thaw.remote.folder import FolderBucket
from thaw.remote.gc import GcWish, collect
from thaw.remote.layout import NamespaceBucket
from thaw.remote.push import PushWish, push
from thaw.remote.refs import RemoteRef
from thaw.store import Store

AT_ONCE = GcWish(grace_s=0.0, keep_reflog_s=0.0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """`main`, and `side` behind it."""
    made = Store.init(tmp_path / "here")
    first = commit(made, tokens(600), branch="main")
    commit(made, tokens(900), branch="side", parents=(first,), base=first)
    return made


def delete(store: Store, bucket: Path, branch: str) -> None:
    push(store, remote(bucket), [PushWish("branch", branch, None)])


def data(bucket: Path) -> list[str]:
    return [path.name for part in ("packs", "manifests") for path in files(bucket, part)]


def look(bucket: Path, path: Path) -> dict[str, str]:
    """Fetches everything into a new repository and reads it."""
    with Store.init(path) as there:
        fetch(there, remote(bucket))
        for one in there.commits():
            read_all(there, one)
        return {ref.name: ref.target for ref in there.refs()}


def test_what_is_reached_stays_and_what_is_not_goes_in_two_runs(store: Store, bucket: Path, tmp_path: Path) -> None:
    for branch in ("main", "side"):
        push(store, remote(bucket), [wish(store, branch)])
    whole = data(bucket)
    assert collect(remote(bucket), AT_ONCE).num_condemned == 0
    delete(store, bucket, "side")
    told = collect(remote(bucket), AT_ONCE._replace(dry_run=True))
    first = collect(remote(bucket), AT_ONCE)
    assert first.phase == "waiting" and first.num_condemned == told.num_condemned == 2 and data(bucket) == whole
    second = collect(remote(bucket), AT_ONCE)
    assert (second.phase, second.num_deleted, second.deleted_nbytes) == ("done", 2, first.condemned_nbytes)
    assert len(data(bucket)) == len(whole) - 2
    assert look(bucket, tmp_path / "there") == {"origin/main": store.ref("main").target}  # type: ignore[union-attr]


def test_nothing_goes_before_its_grace_period_or_while_a_reflog_names_it(store: Store, bucket: Path) -> None:
    push(store, remote(bucket), [wish(store, "main"), wish(store, "side")])
    delete(store, bucket, "side")
    assert collect(remote(bucket), GcWish(grace_s=0.0)).num_condemned == 0, "the reflog names it"
    assert collect(remote(bucket), GcWish(keep_reflog_s=0.0)).num_condemned == 0, "it is younger than the grace period"
    assert collect(remote(bucket), AT_ONCE).num_condemned == 1
    later = collect(remote(bucket), GcWish(grace_s=3600.0, keep_reflog_s=0.0))
    assert later.phase == "waiting" and 3500 < later.seconds_to_wait <= 3600 and later.num_deleted == 0


def test_gc_deletes_nothing_where_something_that_is_needed_is_lost(store: Store, bucket: Path) -> None:
    push(store, remote(bucket), [wish(store, "main")])
    push(store, remote(bucket), [wish(store, "side")])
    delete(store, bucket, "side")
    epoch = NamespaceBucket(FolderBucket(bucket), "")
    standing = refs.read(epoch, "branch", "main")
    assert standing is not None and standing.ref.manifest is not None
    lost = bucket / "default" / standing.ref.manifest
    lost.rename(tmp := bucket / "aside")
    whole = data(bucket)
    with pytest.raises(CorruptBlob, match="not there any more"):
        collect(remote(bucket), AT_ONCE)
    assert data(bucket) == whole
    tmp.rename(lost)
    assert collect(remote(bucket), AT_ONCE).num_condemned == 2


class Meddling(FolderBucket):
    """Before the request `(method, end of key)` is made for the `at`-th time, something else happens."""

    def __init__(self, root: Path, method: str, end: str, at: int, act: Callable[[], object]) -> None:
        super().__init__(root)
        self._what, self._left, self._act = (method, end), at, act
        self.acted = False

    def _meddle(self, method: str, key: str) -> None:
        if method == self._what[0] and key.endswith(self._what[1]) and not self.acted:
            self._left -= 1
            if not self._left:
                self.acted = True
                self._act()

    def read(self, key: str) -> FoundObject | None:
        self._meddle("read", key)
        return super().read(key)

    def create(self, key: str, data: bytes) -> Version | None:
        self._meddle("create", key)
        return super().create(key, data)

    def swap(self, key: str, data: bytes, expected: Version) -> Version | None:
        self._meddle("swap", key)
        return super().swap(key, data, expected)


MOMENTS = {
    "before it looks at refs": ("read", "refs/branch/side", 1),
    "before it reads the ref that it moves": ("read", "refs/branch/side", 2),
    "before it checks gc's state": ("read", layout.GC, 2),
    "between that and the move": ("swap", "refs/branch/side", 1),
}


def race(store: Store, bucket: Path, moment: str) -> tuple[Meddling, bool]:
    """`side` is gone in the remote, its data is not; a push finds that, and gc runs whole at one moment of the push.
    Returns whether the push came to its end."""
    push(store, remote(bucket), [wish(store, "main"), wish(store, "side")])
    push(store, remote(bucket), [wish(store, "main")])
    delete(store, bucket, "side")

    def gc() -> None:
        for _ in range(2):
            collect(remote(bucket), AT_ONCE)

    meddling = Meddling(bucket, *MOMENTS[moment], gc)
    try:
        push(store, remote(meddling), [wish(store, "side")])
    except RefConflict:
        return meddling, False
    return meddling, True


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_push_that_finds_its_data_there_survives_a_gc_that_takes_it(
    store: Store, bucket: Path, tmp_path: Path, moment: str
) -> None:
    meddling, done = race(store, bucket, moment)
    assert meddling.acted and done
    there = look(bucket, tmp_path / "there")
    assert there["origin/side"] == store.ref("side").target  # type: ignore[union-attr]


@pytest.mark.parametrize("moment", ["before it reads the ref that it moves", "between that and the move"])
def test_without_the_check_or_the_fence_that_push_would_lose_its_data(
    store: Store, bucket: Path, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check on the check: what `test_a_push_that_finds…` holds is held by nothing else."""

    def seen(bucket: NamespaceBucket, kind: refs.Kind, name: str, number: int) -> RemoteRef | None:
        found = refs.read(bucket, kind, name)
        return None if found is None else found.ref

    if moment == "between that and the move":
        monkeypatch.setattr(refs, "fence", seen)
    else:
        monkeypatch.setattr("thaw.remote.push._Push.gc_between", lambda work: False)
    meddling, done = race(store, bucket, moment)
    assert meddling.acted and done
    with pytest.raises((CorruptBlob, RemoteError)):
        look(bucket, tmp_path / "there")


def rescued_and_lost(store: Store, bucket: Path) -> None:
    """What is condemned is named again by a push that lands before the list does. While it is swept, a second push
    builds on it, the branch that named it is deleted, and gc looks at that branch only then."""
    side = store.ref("side")
    assert side is not None
    commit(store, tokens(1200), branch="aim", parents=(side.target,), base=side.target)
    for branch in ("main", "side"):
        push(store, remote(bucket), [wish(store, branch)])
    delete(store, bucket, "side")
    late = Meddling(bucket, "create", layout.GC, 1, lambda: push(store, remote(bucket), [wish(store, "side")]))
    assert collect(remote(late), AT_ONCE).num_condemned == 2 and late.acted
    last = Meddling(bucket, "read", layout.GC, 2, lambda: delete(store, bucket, "side"))
    sweep = Meddling(bucket, "read", "refs/branch/side", 1, lambda: push(store, remote(last), [wish(store, "aim")]))
    collect(remote(sweep), AT_ONCE._replace(workers=1))
    assert sweep.acted and last.acted


def test_while_gc_deletes_nothing_is_built_on_what_it_may_delete(store: Store, bucket: Path, tmp_path: Path) -> None:
    rescued_and_lost(store, bucket)
    assert look(bucket, tmp_path / "there")["origin/aim"] == store.ref("aim").target  # type: ignore[union-attr]


def test_a_push_that_did_build_on_it_would_lose_its_data(
    store: Store, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check on the check."""
    monkeypatch.setattr("thaw.remote.push._Push._drop_condemned", lambda work, theirs: None)
    rescued_and_lost(store, bucket)
    with pytest.raises((CorruptBlob, RemoteError)):
        look(bucket, tmp_path / "there")


def test_a_gc_that_was_killed_while_it_swept_is_finished_by_the_next(
    store: Store, bucket: Path, tmp_path: Path
) -> None:
    push(store, remote(bucket), [wish(store, "main")])
    push(store, remote(bucket), [wish(store, "side")])
    delete(store, bucket, "side")
    collect(remote(bucket), AT_ONCE)

    class Killed(FolderBucket):
        def delete(self, keys: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(remote(Killed(bucket)), AT_ONCE)
    assert epochs.read(NamespaceBucket(FolderBucket(bucket), ""))[0].phase == "sweeping"
    push(store, remote(bucket), [wish(store, "side")])
    assert collect(remote(bucket), AT_ONCE).num_deleted == 2
    assert look(bucket, tmp_path / "there")["origin/side"] == store.ref("side").target  # type: ignore[union-attr]


def test_of_two_gcs_one_is_told_to_wait(store: Store, bucket: Path) -> None:
    push(store, remote(bucket), [wish(store, "main")])
    push(store, remote(bucket), [wish(store, "side")])
    delete(store, bucket, "side")
    second = Meddling(bucket, "read", "refs/branch/main", 1, lambda: collect(remote(bucket), AT_ONCE))
    with pytest.raises(Busy, match="another gc"):
        collect(remote(second), AT_ONCE)
    assert collect(remote(bucket), AT_ONCE).num_deleted == 2


def test_eight_writers_lose_and_double_no_move_of_a_ref(bucket: Path) -> None:
    move_at_once(FolderBucket(bucket), writers=8, moves=25)
