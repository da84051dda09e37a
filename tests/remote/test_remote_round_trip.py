"""Push, clone, fetch and pull: what arrives is what was sent, and a session continues from it without prefilling."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hosts import commit, files, kv_of, remote, tokens, tree, wish

import thaw
from thaw import Sampling, aio
from thaw.core.errors import (
    Conflict,
    CorruptBlob,
    IdentityMismatch,
    InvalidRequest,
    NotFound,
    RefConflict,
    RemoteDenied,
    RemoteMissing,
)  # fmt: skip
from thaw.engines.base import Engine
from thaw.remote import layout, refs
from thaw.remote.fetch import fetch
from thaw.remote.folder import FolderBucket
from thaw.remote.parallel import mapped
from thaw.remote.push import push
from thaw.repo import Repository
from thaw.repo.children import free_name
from thaw.store import Store

TEXT = "a document that is long enough to be shared. " * 60
GREEDY = Sampling(max_tokens=16, temperature=0.0, ignore_eos=True, logprobs=3)


def test_a_clone_goes_on_with_nothing_prefilled_and_the_same_bytes(
    here: Repository, far_engine: Engine, bucket: Path, tmp_path: Path
) -> None:
    tree(here, TEXT, 3)
    sent = here.push(all=True)
    assert [ref.outcome for ref in sent.refs] == ["new"] * 4 and sent.num_commits == 4
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine) as there:
        assert {ref.name for ref in there.branches()} == {"main"} and there.store.head == "main"
        for name in ("main", "fork/0", "fork/1", "fork/2"):
            ours, theirs = here.resolve(name), there.resolve(f"origin/{name}")
            assert (ours.commit, ours.state) == (theirs.commit, theirs.state)
            assert kv_of(here.store, ours.commit) == kv_of(there.store, theirs.commit)
        with there.fork("origin/fork/1", 2) as kids, here.fork("fork/1", 2) as siblings:
            for proof in kids.proofs:
                assert proof.hit and proof.num_recomputed_tokens == 0
                assert proof.num_cached_tokens == proof.num_prompt_tokens - 1
            far, near = kids.generate("And then?", GREEDY), siblings.generate("And then?", GREEDY)
            assert [out.token_ids for out in far] == [out.token_ids for out in near]
            assert [out.logprobs for out in far] == [out.logprobs for out in near]
        assert there.fsck().ok and there.verify("origin/main", fresh_process=False).ok


def test_only_what_is_lacking_is_moved(here: Repository, far_engine: Engine, bucket: Path, tmp_path: Path) -> None:
    tree(here, TEXT, 2)
    first = here.push("main")
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine) as there:
        second = here.push(all=True)
        assert second.blob_nbytes < first.blob_nbytes / 10 and second.num_commits == 2
        got = there.fetch()
        assert got.blob_nbytes == second.blob_nbytes and got.num_commits == 2
        assert here.push(all=True).nbytes == there.fetch().nbytes == 0


@pytest.mark.parametrize("part", ["packs", "manifests", "refs/branch"])
def test_a_flipped_byte_is_refused_by_name_and_leaves_nothing(
    here: Repository, far_engine: Engine, bucket: Path, tmp_path: Path, part: str
) -> None:
    """In a pack every byte is flipped that is the middle of an object or a blob; elsewhere the middle of the file."""
    tree(here, TEXT, 1)
    here.push("main")
    there = thaw.open(tmp_path / "there", engine=far_engine)
    there.add_remote("origin", bucket.as_uri())
    (damaged,) = files(bucket, part)
    whole = damaged.read_bytes()
    for at in _middles(damaged) if part == "packs" else [len(whole) // 2]:
        flipped = bytearray(whole)
        flipped[at] ^= 1
        damaged.write_bytes(flipped)
        with pytest.raises(CorruptBlob) as refused:
            there.fetch()
        assert part == "refs/branch" or damaged.name in str(refused.value) or damaged.stem[:10] in str(refused.value)
        assert there.store.refs() == [] and list(there.store.commits()) == []
    damaged.write_bytes(whole)
    there.fetch()
    assert there.fsck().ok and kv_of(there.store, there.resolve("origin/main").commit)
    there.close()


def _middles(pack: Path) -> list[int]:
    from thaw.data.pack import read_header

    entries = [entry for entry in read_header(pack).entries if not entry.is_pad]
    assert {entry.is_object for entry in entries} == {True, False}
    return [entry.offset + entry.nbytes // 2 for entry in entries]


def test_a_pack_that_is_gone_or_cut_is_said(here: Repository, bucket: Path, tmp_path: Path, far_engine: Engine) -> None:
    tree(here, TEXT, 1)
    here.push("main")
    (pack,) = files(bucket, "packs")
    whole = pack.read_bytes()
    for left in (whole[: len(whole) // 2], None):
        pack.unlink()
        if left is not None:
            pack.write_bytes(left)
        with pytest.raises(RemoteMissing, match=pack.name):
            thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine)
        assert not (tmp_path / "there").exists()


def test_another_model_is_refused_as_at_home(here: Repository, bucket: Path, tmp_path: Path) -> None:
    tree(here, TEXT, 1)
    here.push("main")
    with thaw.load_engine("fake", seed=1) as other, thaw.clone(bucket.as_uri(), tmp_path / "o", engine=other) as there:
        with pytest.raises(IdentityMismatch) as refused:
            there.session("origin/main")
        assert refused.value.stored != refused.value.running


def test_a_branch_moves_forward_only_unless_the_lease_holds(
    here: Repository, far_engine: Engine, bucket: Path, tmp_path: Path
) -> None:
    tree(here, TEXT, 2)
    here.push(all=True)
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine) as there:
        with there.session("main") as s:
            s.append("more here")
            theirs = s.commit("theirs", branch="main").commit
        there.push("main")
        here.adopt("fork/0", "main")
        ours = here.resolve("main").commit
        with pytest.raises(RefConflict, match="thaw fetch origin"):
            here.push("main")
        with pytest.raises(RefConflict, match="somebody else moved it"):
            here.push("main", force_with_lease=True)
        here.fetch()
        with pytest.raises(RefConflict, match="does not descend"):
            here.push("main")
        with pytest.raises(RefConflict) as both:
            here.pull()
        assert ours[3:13] in str(both.value) and theirs[3:13] in str(both.value)
        assert here.resolve("main").commit == ours and here.resolve("origin/main").commit == theirs
        assert [ref.outcome for ref in here.push("main", force_with_lease=True).refs] == ["forced"]
        assert [ref.outcome for ref in there.fetch("main").refs] == ["forced"]
        assert there.resolve("origin/main").commit == ours and there.resolve("origin/main@{1}").commit == theirs


def test_pull_moves_forward_and_says_where_one_is_ahead(
    here: Repository, far_engine: Engine, bucket: Path, tmp_path: Path
) -> None:
    tree(here, TEXT, 1)
    here.push("main", set_upstream=True)
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine) as there:
        assert there.pull().refs[-1].outcome == "up-to-date"
        here.adopt("fork/0", "main")
        assert here.pull().refs[-1].outcome == "ahead"
        here.push()
        assert there.pull().refs[-1].outcome == "moved"
        assert there.resolve("main").commit == here.resolve("main").commit
        assert there.pull("main", remote="origin").refs[-1].outcome == "up-to-date"
        with pytest.raises(NotFound, match="nowhere"):
            there.pull("nowhere")


def test_a_deleted_branch_keeps_its_generation(here: Repository, bucket: Path, tmp_path: Path) -> None:
    tree(here, TEXT, 1)
    here.push(all=True)
    here.push("fork/0", delete=True)
    assert "origin/fork/0" not in [ref.name for ref in here.store.refs()]
    with pytest.raises(NotFound, match="to delete"):
        here.push("fork/0", delete=True)
    assert [ref.outcome for ref in here.push("fork/0").refs] == ["new"]
    part = layout.NamespaceBucket(FolderBucket(bucket), "")
    standing = refs.read(part, "branch", "fork/0")
    assert standing is not None and standing.ref.generation == 3
    log = [part.read(layout.reflog_key("branch", "fork/0", number)) for number in (1, 2)]
    said = [refs.decode(found.data, "branch", "fork/0") for found in log if found is not None]
    assert [(one.generation, one.commit) for one in said] == [(1, here.resolve("fork/0").commit), (2, None)]


def test_a_fetch_forgets_a_deleted_branch_when_asked(
    here: Repository, far_engine: Engine, bucket: Path, tmp_path: Path
) -> None:
    tree(here, TEXT, 1)
    here.push(all=True)
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine) as there:
        here.push("fork/0", delete=True)
        there.fetch()
        assert there.resolve("origin/fork/0")
        assert ("origin/fork/0", "deleted") in [(ref.name, ref.outcome) for ref in there.fetch(prune=True).refs]
        with pytest.raises(NotFound):
            there.resolve("origin/fork/0")


def test_tags_are_pushed_and_fetched_and_do_not_move(
    here: Repository, far_engine: Engine, bucket: Path, tmp_path: Path
) -> None:
    tree(here, TEXT, 1)
    here.tag("v1", "main")
    here.push("main", tags=True)
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine) as there:
        assert [ref.name for ref in there.tags()] == ["v1"]
        here.delete_tag("v1")
        here.tag("v1", "fork/0")
        with pytest.raises(RefConflict, match="tags do not move"):
            here.push("v1")
        here.push("v1", delete=True)
        here.push("v1")
        kept = {ref.name: ref for ref in there.fetch().refs}["v1"]
        assert kept.outcome == "kept" and kept.old == there.resolve("v1").commit != kept.new


def test_tracking_points_are_points_and_nothing_else(here: Repository) -> None:
    tree(here, TEXT, 1)
    here.push("main")
    tip = here.resolve("main").commit
    assert here.resolve("origin/main").commit == here.show("origin/main").point.commit == tip
    assert here.log("origin/main")[0].refs == ("HEAD -> main", "origin/main")
    assert here.diff("origin/main", "fork/0").num_common_tokens == here.resolve("main").num_tokens
    assert here.resolve("origin/main:token=7").num_tokens == 7
    assert here.tags() == [] and [ref.name for ref in here.branches()] == ["fork/0", "main"]
    with here.session("origin/main") as s:
        assert s.branch is None
        with pytest.raises(InvalidRequest, match="only fetch and push move it"):
            s.commit("mine", branch="origin/main")
    forbidden = [lambda: here.branch("origin/mine"), lambda: here.tag("origin/mine")]
    forbidden += [lambda: here.rename("main", "origin/x"), lambda: here.rename("origin/main", "x")]
    forbidden += [lambda: here.adopt("fork/0", "origin/main"), lambda: here.undo("origin/main")]
    forbidden += [lambda: free_name(here, "origin", 2)]
    for act in forbidden:
        with pytest.raises(InvalidRequest, match="origin"):
            act()
    assert here.gc(keep_reflog_s=0).commits_removed == 0
    here.remove_remote("origin")
    assert here.remotes() == {} and [ref.name for ref in here.store.refs()] == ["fork/0", "main"]


def test_remotes_are_named_once_and_addresses_hold_no_credential(here: Repository, bucket: Path) -> None:
    with pytest.raises(Conflict, match="already"):
        here.add_remote("origin", bucket.as_uri())
    with pytest.raises(InvalidRequest, match="cannot name a remote"):
        here.add_remote("a/b", bucket.as_uri())
    with pytest.raises(InvalidRequest) as refused:
        here.add_remote("other", "s3://key:very-secret@bucket/x")
    assert "very-secret" not in str(refused.value)
    with pytest.raises(NotFound, match="thaw remote add elsewhere"):
        here.push(remote="elsewhere")
    with pytest.raises(NotFound, match="nothing was pushed"):
        here.fetch()
    tree(here, TEXT, 1)
    with pytest.raises(Conflict, match="fork/0"):
        here.add_remote("fork", bucket.as_uri())


def test_one_branch_can_be_cloned_alone(here: Repository, far_engine: Engine, bucket: Path, tmp_path: Path) -> None:
    tree(here, TEXT, 2)
    here.push(all=True)
    url = bucket.as_uri()
    with thaw.clone(url, tmp_path / "one", engine=far_engine, branch="fork/1", single_branch=True) as one:
        assert [ref.name for ref in one.store.refs()] == ["fork/1", "origin/fork/1"] and one.store.head == "fork/1"
        assert len(list(one.store.commits())) == 2
    with pytest.raises(NotFound, match="no branch 'none'"):
        thaw.clone(url, tmp_path / "two", branch="none")
    with pytest.raises(Conflict, match="not empty"):
        thaw.clone(url, tmp_path / "one")
    assert not (tmp_path / "two").exists() and (tmp_path / "one" / "thaw.db").exists()


def test_of_clones_into_one_folder_one_is_made_and_none_removes_it(
    here: Repository, bucket: Path, tmp_path: Path
) -> None:
    tree(here, TEXT, 1)
    here.push("main")
    for number in range(5):
        there = tmp_path / f"{number}" / "there"

        def cloned(_: int, path: Path = there) -> str:
            try:
                thaw.clone(bucket.as_uri(), path).close()
                return "made"
            except Conflict:
                return "refused"

        done = mapped(cloned, range(4), 4)
        assert sorted(done) == ["made", "refused", "refused", "refused"]
        with thaw.open(there) as repo:
            assert repo.fsck().ok and repo.resolve("main").commit == here.resolve("main").commit
    with pytest.raises(NotFound):
        thaw.clone(bucket.as_uri(), tmp_path / "0" / "other", branch="none")
    with pytest.raises(NotFound):
        thaw.clone(bucket.as_uri(), tmp_path / "new" / "other", branch="none")
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["there"] and not (tmp_path / "new").exists()


class ReadOnly(FolderBucket):
    """What a key that may only read leaves of a bucket."""

    def _refuse(self, *_: object) -> None:
        raise RemoteDenied("this key may only read")

    put = create = swap = delete = now = _refuse  # type: ignore[assignment]


def test_a_key_that_may_only_read_can_fetch_and_clone(
    here: Repository, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(here, TEXT, 1)
    here.push(all=True)
    monkeypatch.setattr("thaw.remote.address.open_bucket", lambda address: ReadOnly(bucket))
    with thaw.clone(bucket.as_uri(), tmp_path / "there") as there:
        assert there.fetch().num_commits == 0 and there.fsck().ok
        there.branch("mine", "origin/fork/0")
        with pytest.raises(RemoteDenied):
            there.push("mine")


def test_twelve_forks_cost_their_own_kv_and_16_kib_each(here: Repository, bucket: Path) -> None:
    """Counted where it lies: every byte that the second push added to the remote."""
    with here.session(seed=1) as s:
        s.append(TEXT)
        s.commit("read it", branch="main")
        here.push("main")
        before = sum(path.stat().st_size for path in bucket.rglob("*") if path.is_file())
        with s.fork(12) as kids:
            kids.generate(["Why is that so?"] * 12, Sampling(max_tokens=64, ignore_eos=True))
            for i, kid in enumerate(kids):
                kid.commit(f"child {i}", branch=f"fork/{i}")
    sent = here.push(all=True)
    added = sum(path.stat().st_size for path in bucket.rglob("*") if path.is_file()) - before
    assert sent.num_commits == 12 and sent.blob_nbytes > 12 * 64 * 32
    assert added <= 1.01 * sent.blob_nbytes + 12 * 16384
    assert sent.blob_nbytes < 0.4 * sum(os.stat(path).st_size for path in files(bucket, "packs"))


def test_a_long_history_is_read_in_few_steps(bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 commits one after the other: manifests are read along trails, many at a time."""
    last, number = None, 100
    with Store.init(tmp_path / "here") as store:
        for i in range(number):
            last = commit(store, tokens(20, i), parents=(last,) if last else ())
        push(store, remote(bucket), [wish(store, "main")])
    steps: list[int] = []

    def counted(do: Callable[[object], object], items: list[object], *more: int) -> list[object]:
        steps.append(len(items))
        return mapped(do, items, *more)

    monkeypatch.setattr("thaw.remote.history.mapped", counted)
    with Store.init(tmp_path / "there") as store:
        assert fetch(store, remote(bucket)).num_commits == number
    assert sum(steps) == number and sum(step > 0 for step in steps) <= 2 * number.bit_length()


def test_the_awaited_forms_do_the_same(here: Repository, far_engine: Engine, bucket: Path, tmp_path: Path) -> None:
    tree(here, TEXT, 1)

    async def main() -> None:
        near = aio.AsyncRepository(here)
        assert (await near.push("main")).num_commits == 1 and list(await near.remotes()) == ["origin"]
        async with await aio.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine) as there:
            await near.push(all=True)
            assert (await there.fetch()).num_commits == 1
            assert (await there.pull()).refs[-1].outcome == "up-to-date"
            assert (await there.remote_gc(dry_run=True)).num_condemned == 0
            await there.add_remote("other", (tmp_path / "other").as_uri())
            await there.remove_remote("other")

    asyncio.run(main())


def test_a_clone_of_names_fetches_what_is_used(
    here: Repository, far_engine: Engine, bucket: Path, tmp_path: Path
) -> None:
    tree(here, TEXT, 2)
    here.push(all=True)
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine, refs_only=True) as there:
        assert there.store.refs() == [] and list(there.store.commits()) == [] and there.store.head == "main"
        assert not list(there.store.packs.iterdir())
        with pytest.raises(NotFound, match="nowhere"):
            there.resolve("origin/nowhere")
        with there.fork("origin/fork/1", 2) as kids, here.fork("fork/1", 2) as siblings:
            assert all(proof.hit and proof.num_recomputed_tokens == 0 for proof in kids.proofs)
            far, near = kids.generate("And then?", GREEDY), siblings.generate("And then?", GREEDY)
            assert [out.token_ids for out in far] == [out.token_ids for out in near]
        assert [ref.name for ref in there.store.refs()] == ["origin/fork/1"], "and no other branch"
        assert there.log("origin/fork/0")[0].commit == here.resolve("fork/0").commit
        assert there.pull().refs[-1].outcome == "new" and there.resolve("main").commit == here.resolve("main").commit
        assert there.fsck().ok
    with thaw.clone(bucket.as_uri(), tmp_path / "other", refs_only=True) as other:
        other.remove_remote("origin")
        with pytest.raises(NotFound):
            other.resolve("origin/main")
