"""What a remote forgets is in none of its bytes any more, and all else is as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hosts import commit, files, kv_of, read_all, remote, tokens, tree, wish
from servers import BUCKET, WRITER, StoreServer
from store_fixtures import moto_server, store_keys  # noqa: F401 - fixtures
from test_remote_gc import AT_ONCE, Meddling
from test_remote_killed import run

import thaw
from thaw.core.errors import Conflict, CorruptBlob, InvalidRequest, NotFound, RefConflict, RemoteMissing
from thaw.engines.base import Engine
from thaw.remote import refs, values
from thaw.remote.address import open_bucket
from thaw.remote.fetch import fetch
from thaw.remote.folder import FolderBucket
from thaw.remote.forget import forget
from thaw.remote.gc import GcWish, collect
from thaw.remote.layout import NamespaceBucket
from thaw.remote.push import PushWish, Tuning, push
from thaw.repo import Repository
from thaw.store import Store

BRANCHES = ("main", "fork/0", "fork/1", "fork/2")
SMALL = Tuning(pack_bytes=32 << 10)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """`main`, and three branches behind it."""
    made = Store.init(tmp_path / "here")
    first = commit(made, tokens(700), branch="main")
    for number in range(3):
        commit(made, tokens(1000, number + 1), branch=f"fork/{number}", parents=(first,))
    return made


def traces(bucket: Path, store: Store, branch: str) -> set[str]:
    """What of a branch lies in the remote, of that which no other has: ids, and KV by its bytes."""
    reach = {name: kv_of(store, target(store, name)) for name in BRANCHES}
    others = {blob for name, blobs in reach.items() if name != branch for blob in blobs}
    own = {blob: data for blob, data in reach[branch].items() if blob not in others}
    assert own
    whole = b"".join(path.read_bytes() for path in bucket.rglob("*") if path.is_file())
    found = {blob for blob, data in own.items() if blob.encode() in whole or data in whole}
    return found | ({"commit"} if target(store, branch).encode() in whole else set())


def target(store: Store, branch: str) -> str:
    ref = store.ref(branch)
    assert ref is not None
    return ref.target


def send(store: Store, bucket: Path, *, each: bool = False) -> None:
    """All branches, by one push, whose packs they share, or by one each."""
    wishes = [wish(store, branch) for branch in BRANCHES]
    for some in [[one] for one in wishes] if each else [wishes]:
        push(store, remote(bucket), some, tuning=Tuning() if each else Tuning(pack_bytes=1 << 20))


def look(bucket: Path, path: Path, store: Store, branches: tuple[str, ...]) -> None:
    """What is left is whole, and what it was."""
    with Store.init(path) as there:
        fetch(there, remote(bucket))
        assert {ref.name: ref.target for ref in there.refs()} == {
            f"origin/{name}": target(store, name) for name in branches
        }
        for one in there.commits():
            read_all(there, one)
        for name in branches:
            assert kv_of(there, target(store, name)) == kv_of(store, target(store, name))


@pytest.mark.parametrize("each", [False, True], ids=["packs shared", "packs apart"])
def test_nothing_of_it_is_left_and_all_else_is(store: Store, bucket: Path, tmp_path: Path, each: bool) -> None:
    send(store, bucket, each=each)
    assert "commit" in traces(bucket, store, "fork/1") and len(traces(bucket, store, "fork/1")) > 1
    done = forget(remote(bucket), [("branch", "fork/1")])
    assert not traces(bucket, store, "fork/1")
    assert done.num_commits == 1 and (done.num_rewritten_packs > 0) != each and done.old_versions == "none"
    look(bucket, tmp_path / "there", store, ("main", "fork/0", "fork/2"))
    assert push(store, remote(bucket), [wish(store, "fork/0")]).nbytes == 0
    again = push(store, remote(bucket), [wish(store, "fork/1")])
    assert again.refs[0].outcome == "new" and again.num_commits == 1
    look(bucket, tmp_path / "again", store, BRANCHES)
    assert forget(remote(bucket), [("branch", "fork/1"), ("branch", "fork/2")]).num_commits == 2
    assert not traces(bucket, store, "fork/1") | traces(bucket, store, "fork/2")
    look(bucket, tmp_path / "last", store, ("main", "fork/0"))


def test_deleting_and_collecting_leaves_traces(store: Store, bucket: Path) -> None:
    """The control: what `forget` is more than."""
    send(store, bucket)
    push(store, remote(bucket), [PushWish("branch", "fork/1", None)])
    for _ in range(2):
        collect(remote(bucket), AT_ONCE)
    assert len(traces(bucket, store, "fork/1")) > 1
    assert forget(remote(bucket), [("branch", "fork/1")]).num_rewritten_packs > 0
    assert not traces(bucket, store, "fork/1"), "one that was deleted before is forgotten still"


def test_one_that_another_branch_has_is_refused(store: Store, bucket: Path, tmp_path: Path) -> None:
    send(store, bucket)
    before = sorted((path, path.stat().st_mtime_ns) for path in files(bucket, "refs"))
    with pytest.raises(Conflict, match=r"fork/0.*has commit"):
        forget(remote(bucket), [("branch", "main")])
    with pytest.raises(NotFound, match="never was one"):
        forget(remote(bucket), [("branch", "none")])
    assert sorted((path, path.stat().st_mtime_ns) for path in files(bucket, "refs")) == before
    forget(remote(bucket), [("branch", name) for name in BRANCHES])
    assert not files(bucket, "packs") and not files(bucket, "manifests") and not files(bucket, "reflog")


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_push_in_between_loses_nothing(store: Store, bucket: Path, tmp_path: Path, at: int) -> None:
    """Another host pushes a child of `fork/0`, whose pack is rewritten, at one of the moves of a ref."""
    send(store, bucket)
    zero = target(store, "fork/0")
    made = commit(store, tokens(1300, 9), branch="late", parents=(zero,))
    act: list[object] = []

    def late() -> None:
        act.append(push(store, remote(bucket), [wish(store, "late")]))

    meddling = Meddling(
        bucket, "swap", ("refs/branch/fork=1", "refs/branch/fork=0", "refs/branch/main")[at - 1], 1, late
    )
    forget(remote(meddling), [("branch", "fork/1")], workers=1)
    assert act and not traces(bucket, store, "fork/1")
    with Store.init(tmp_path / "there") as there:
        fetch(there, remote(bucket))
        assert {ref.name for ref in there.refs()} == {f"origin/{n}" for n in ("main", "fork/0", "fork/2", "late")}
        for one in there.commits():
            read_all(there, one)
        assert there.has(made)


def test_a_branch_that_moves_meanwhile_is_not_forgotten(store: Store, bucket: Path) -> None:
    send(store, bucket)
    made = commit(store, tokens(1300, 9), branch="fork/1", parents=(target(store, "fork/1"),))
    late = Meddling(
        bucket, "swap", "refs/branch/fork=1", 1, lambda: push(store, remote(bucket), [wish(store, "fork/1")])
    )
    with pytest.raises(RefConflict, match="moved meanwhile"):
        forget(remote(late), [("branch", "fork/1")], workers=1)
    standing = refs.read(NamespaceBucket(FolderBucket(bucket), ""), "branch", "fork/1")
    assert standing is not None and standing.ref.commit == made


def test_a_reflog_entry_that_comes_late_stops_no_gc(store: Store, bucket: Path, tmp_path: Path) -> None:
    send(store, bucket)
    part = NamespaceBucket(FolderBucket(bucket), "")
    standing = refs.read(part, "branch", "fork/1")
    assert standing is not None
    forget(remote(bucket), [("branch", "fork/1")])
    part.put("reflog/branch/fork=1/0000000001", values.encode(refs.unfenced(standing.ref)))
    push(store, remote(bucket), [PushWish("branch", "fork/2", None)])
    assert collect(remote(bucket), AT_ONCE._replace(keep_reflog_s=1e6)).num_condemned == 0
    look(bucket, tmp_path / "there", store, ("main", "fork/0"))
    forget(remote(bucket), [("branch", "fork/1"), ("branch", "fork/2")])
    look(bucket, tmp_path / "last", store, ("main", "fork/0"))


def test_damage_in_what_stays_is_told_and_nothing_is_deleted(store: Store, bucket: Path) -> None:
    send(store, bucket)
    for path in files(bucket, "packs"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    before = files(bucket, "packs")
    with pytest.raises(CorruptBlob, match="damaged"):
        forget(remote(bucket), [("branch", "fork/1")])
    assert set(before) <= set(files(bucket, "packs"))


@pytest.mark.slow("twenty processes, each killed")
def test_killed_at_any_request_it_goes_on(store: Store, bucket: Path, tmp_path: Path) -> None:
    send(store, bucket)
    chance, killed = random.Random(4), 0
    for number in range(12):
        killed += run("forget:fork/1", store.path, bucket, chance.randint(5, 20 + 5 * number)) is None
        look(bucket, tmp_path / f"there{number}", store, ("main", "fork/0", "fork/2")) if number else None
    assert killed >= 5
    forget(remote(bucket), [("branch", "fork/1")])
    assert not traces(bucket, store, "fork/1")
    look(bucket, tmp_path / "last", store, ("main", "fork/0", "fork/2"))


def test_a_bucket_that_keeps_versions_is_told(
    moto_server: StoreServer,  # noqa: F811 - a fixture
    store: Store,
) -> None:
    import boto3

    def told() -> str:
        address = moto_server.address()
        there = remote(open_bucket(address))
        push(store, there, [wish(store, "main")])
        return forget(there, [("branch", "main")]).old_versions

    assert told() == "none"
    client = boto3.client(
        "s3", endpoint_url=moto_server.endpoint, region_name="us-east-1", aws_access_key_id=WRITER[0],
        aws_secret_access_key=WRITER[1],
    )  # fmt: skip
    client.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    assert told() == "kept"


def test_a_repository_forgets_in_its_remote_and_keeps_its_own(
    here: Repository, far_engine: Engine, bucket: Path, tmp_path: Path
) -> None:
    tree(here, "a document that is long enough to be shared. " * 20, 2)
    here.tag("v1", "fork/0")
    here.push(all=True, tags=True)
    acts: list[Callable[[], object]] = [here.forget_remote, lambda: here.forget_remote("", remote="origin")]
    for act in acts:
        with pytest.raises((InvalidRequest, ValueError, NotFound)):
            act()
    with pytest.raises(Conflict, match="tag 'v1'"):
        here.forget_remote("fork/0")
    report = here.forget_remote("fork/0", "v1")
    assert report.num_commits == 1 and here.resolve("fork/0") and here.resolve("v1")
    assert {ref.name for ref in here.store.refs() if ref.name.startswith("origin/")} == {"origin/main", "origin/fork/1"}
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine) as there:
        assert [ref.name for ref in there.tags()] == []
        with there.fork("origin/fork/1", 2) as kids:
            assert all(proof is not None and proof.hit for proof in kids.proofs)


@pytest.mark.parametrize(
    ("what", "how", "where"),
    [
        ("manifests", "changed", "before both"),
        ("manifests", "lost", "in one"),
        ("packs", "changed", "in one"),
        ("packs", "lost", "before both"),
    ],
)
def test_what_is_damaged_is_forgotten_and_pushed_again(
    store: Store, bucket: Path, tmp_path: Path, what: str, how: str, where: str
) -> None:
    """A push alone sends nothing: the branch is where it should be."""
    base = commit(store, tokens(300), branch="main")
    push(store, remote(bucket), [wish(store, "main")])
    old = files(bucket, what)
    commit(store, tokens(700), branch="side", parents=(base,))
    push(store, remote(bucket), [wish(store, "side")])
    commit(store, tokens(90, seed=9), branch="apart")
    push(store, remote(bucket), [wish(store, "apart")])
    new = [path for path in files(bucket, what) if path not in old]
    needed = [path for path in new if is_of(path, store, "side")] if where == "in one" else old
    damage(needed[0], how)
    names = ["main", "side"]
    with Store.init(tmp_path / "before") as before:
        with pytest.raises((CorruptBlob, RemoteMissing), match="thaw forget --remote"):
            fetch(before, remote(bucket))
        assert push(store, remote(bucket), [wish(store, name) for name in names]).num_packs == 0
        with pytest.raises((CorruptBlob, RemoteMissing)):
            fetch(before, remote(bucket))
    forget(remote(bucket), [("branch", name) for name in names])
    assert needed[0] not in files(bucket, what)
    push(store, remote(bucket), [wish(store, name) for name in names])
    with Store.init(tmp_path / "after") as after:
        fetch(after, remote(bucket))
        for name in (*names, "apart"):
            tip = store.ref(name)
            assert tip is not None and kv_of(after, tip.target) == kv_of(store, tip.target)
    assert collect(remote(bucket), GcWish(grace_s=0)).phase == "done"  # nothing stops it, and nothing is left over


def is_of(path: Path, store: Store, branch: str) -> bool:
    """Whether a pack or manifest names the commit of a branch."""
    tip = store.ref(branch)
    assert tip is not None
    return tip.target.encode() in path.read_bytes()


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "lost":
        path.unlink()
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("key", ["default/refs/branch/main", "default/gc.json", "thaw.json"])
def test_a_small_object_that_is_damaged_is_named_and_can_be_deleted(
    store: Store, bucket: Path, tmp_path: Path, key: str
) -> None:
    send(store, bucket)
    push(store, remote(bucket), [PushWish("branch", "fork/2", None)])
    collect(remote(bucket), GcWish(grace_s=0, keep_reflog_s=0))  # something waits, so there is a gc.json
    damage(bucket / key, "changed")
    wishes = [wish(store, name) for name in BRANCHES[:3]]
    acts: list[Callable[[], object]] = [lambda: push(store, remote(bucket), wishes)]
    with Store.init(tmp_path / "before") as before:
        if key != "default/gc.json":  # which a fetch does not read
            acts.append(lambda: fetch(before, remote(bucket)))
        for act in acts:
            with pytest.raises(CorruptBlob, match=rf"{key.removeprefix('default/')}.* Delete this object"):
                act()
    (bucket / key).unlink()
    push(store, remote(bucket), wishes)
    look(bucket, tmp_path / "after", store, BRANCHES[:3])
    for _ in range(2):
        collect(remote(bucket), GcWish(grace_s=0, keep_reflog_s=0))
    look(bucket, tmp_path / "last", store, BRANCHES[:3])
