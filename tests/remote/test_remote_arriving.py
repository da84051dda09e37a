"""A remote's branch is forked while it is downloaded: the same bits, one download, and the engine reads meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hosts import files, tree

import thaw
from thaw import Sampling
from thaw.core.errors import CorruptBlob, InvalidRequest, NotFound, RemoteUnreachable, StorageFailed, ThawError
from thaw.engines.base import Engine
from thaw.remote import arriving
from thaw.remote.folder import FolderBucket
from thaw.repo import Repository

TEXT = "a document that is long enough to be shared. " * 60
GREEDY = Sampling(max_tokens=16, temperature=0.0, ignore_eos=True, logprobs=3)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many requests and local packs as a large session has."""
    for name, value in {"RUN_BYTES": 8192, "GAP_BYTES": 0, "SHARED_BYTES": 16384, "LOCAL_PACK_BYTES": 20000}.items():
        monkeypatch.setattr(f"thaw.remote.fetch.{name}", value)


@pytest.fixture
def pushed(here: Repository) -> Repository:
    """`main` and three branches behind it, in the remote."""
    tree(here, TEXT, 3)
    here.push(all=True)
    return here


def fresh(path: Path, engine: Engine, bucket: Path) -> Repository:
    repo = thaw.open(path, engine=engine, create=True)
    repo.add_remote("origin", bucket.as_uri())
    return repo


def through(monkeypatch: pytest.MonkeyPatch, bucket: FolderBucket) -> None:
    monkeypatch.setattr("thaw.remote.address.open_bucket", lambda address: bucket)


class Watched(FolderBucket):
    """Runs `before` (number, share of the pack before it) each time KV or objects are read; counts bytes of packs."""

    def __init__(self, root: Path, before: Callable[[int, float], None]) -> None:
        super().__init__(root)
        self._before, self._lock = before, threading.Lock()
        self.num_reads = self.nbytes = 0

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        with self._lock:
            self.num_reads += 1
            number = self.num_reads
        self._before(number, ranges[0][0] / (self.size(key) or 1))
        found = super().read_ranges(key, ranges)
        with self._lock:
            self.nbytes += sum(map(len, found))
        return found


@pytest.mark.parametrize("point", ["origin/fork/1", "origin/fork/1~1", "origin/fork/1:token=700"])
def test_children_of_what_is_downloaded_have_the_bits_of_those_at_home(
    pushed: Repository, far_engine: Engine, bucket: Path, tmp_path: Path, small_pieces: None, point: str
) -> None:
    with fresh(tmp_path / "there", far_engine, bucket) as there:
        with there.fork(point, 2, fetch=True) as far, pushed.fork(point, 2) as near:
            assert all(proof.hit and proof.num_recomputed_tokens == 0 for proof in far.proofs)
            ours, theirs = far.generate("And then?", GREEDY), near.generate("And then?", GREEDY)
            assert [out.token_ids for out in ours] == [out.token_ids for out in theirs]
            assert [out.logprobs for out in ours] == [out.logprobs for out in theirs]
            far[0].commit("further", branch="further")
        assert there.fsck().ok and there.verify("further", fresh_process=False).ok
        assert there.resolve("origin/fork/1").commit == pushed.resolve("fork/1").commit
        assert [ref.name for ref in there.store.refs()] == ["further", "origin/fork/1"]
        with there.session("origin/fork/1", fetch=True) as again:
            assert again.proof is not None and again.proof.hit, "nothing was missing any more"
    assert not arriving._OPEN


def test_the_engine_reads_while_the_last_bytes_are_still_to_come(
    pushed: Repository, far_engine: Engine, bucket: Path, tmp_path: Path, small_pieces: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Requests for the last part of the KV wait until the engine has read some. Each byte is fetched once."""
    begun, late, kv = threading.Event(), list[float](), list[float]()
    read = arriving.read_landed

    def seen(file: int, view: memoryview, offset: int) -> None:
        read(file, view, offset)
        begun.set()

    def before(number: int, at: float) -> None:
        if arriving._OPEN and at > 0.6:
            kv.append(at)
            if not begun.wait(20):
                late.append(at)

    monkeypatch.setattr(arriving, "read_landed", seen)
    watched = Watched(bucket, before)
    through(monkeypatch, watched)
    with fresh(tmp_path / "there", far_engine, bucket) as there, there.fork("origin/main", 2, fetch=True) as kids:
        assert kids.proofs[0] is not None and kids.proofs[0].hit
        assert not late and len(kv) > 2
        assert watched.nbytes < 1.1 * sum(path.stat().st_size for path in there.store.packs.iterdir())


def test_without_fetch_nothing_is_read_from_the_remote(
    pushed: Repository, far_engine: Engine, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: a fork of what is here asks the remote nothing, and one of what is not fails."""
    watched = Watched(bucket, lambda number, at: None)
    through(monkeypatch, watched)
    with fresh(tmp_path / "there", far_engine, bucket) as there:
        with pytest.raises(NotFound, match="origin/main"):
            there.fork("origin/main", 2)
        there.fetch("main")
        done = watched.num_reads
        there.fork("origin/main", 2).close()
        assert watched.num_reads == done > 0


@pytest.mark.parametrize("where", ["in the remote", "in the local pack"])
def test_a_wrong_byte_is_refused_on_the_way(
    pushed: Repository, far_engine: Engine, bucket: Path, tmp_path: Path, small_pieces: None,
    monkeypatch: pytest.MonkeyPatch, where: str,
) -> None:  # fmt: skip
    if where == "in the remote":
        for path in files(bucket, "packs"):
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
    else:
        read = arriving.read_landed

        def flipped(file: int, view: memoryview, offset: int) -> None:
            read(file, view, offset)
            view[0] ^= 1

        monkeypatch.setattr(arriving, "read_landed", flipped)
    with fresh(tmp_path / "there", far_engine, bucket) as there:
        with pytest.raises(CorruptBlob):
            there.fork("origin/fork/2", 2, fetch=True)
        assert (there.store.ref("origin/fork/2") is None) == (where == "in the remote")
        assert there.fsck().ok
    assert not arriving._OPEN


@pytest.mark.parametrize("last", [2, 4, 9])
def test_a_download_that_breaks_off_ends_the_session_too(
    pushed: Repository, far_engine: Engine, bucket: Path, tmp_path: Path, small_pieces: None,
    monkeypatch: pytest.MonkeyPatch, last: int,
) -> None:  # fmt: skip
    def before(number: int, at: float) -> None:
        if number >= last:
            raise RemoteUnreachable("the line is dead")

    with monkeypatch.context() as patch, fresh(tmp_path / "there", far_engine, bucket) as there:
        through(patch, Watched(bucket, before))
        with pytest.raises((RemoteUnreachable, StorageFailed)) as failed:
            there.fork("origin/main", 2, fetch=True)
        assert "the line is dead" in str(failed.value), "what failed first is told"
        assert there.fsck().ok and there.store.ref("origin/main") is None
        patch.undo()
        with there.fork("origin/main", 2, fetch=True) as kids:
            assert kids.proofs[0] is not None and kids.proofs[0].hit
    assert not arriving._OPEN


def test_only_a_remotes_branch_can_be_fetched(here: Repository, tmp_path: Path) -> None:
    tree(here, TEXT, 1)
    forks: list[Callable[[], object]] = [
        lambda: here.fork("main", 2, fetch=True),
        lambda: here.fork(here.resolve("main"), 2, fetch=True),
        lambda: here.session(fetch=True),
        lambda: here.session("HEAD", fetch=True),
    ]
    for act in forks:
        with pytest.raises(InvalidRequest, match="fetch"):
            act()
    with pytest.raises(ThawError, match="nothing was pushed"):
        here.fork("origin/main", 2, fetch=True)


def test_an_arrival_that_has_ended_is_read_no_more() -> None:
    gone = arriving.Arrival([("b3:" + "0" * 64, 10)])
    tier = arriving.open_arriving(gone.address)
    pack = tier.open_pack(gone.pack)
    gone.close()
    with pytest.raises(StorageFailed, match="did not arrive"):
        pack.read_into([memoryview(bytearray(10))], 0)
    with pytest.raises(CorruptBlob, match="has ended"):
        arriving.open_arriving(gone.address)


def test_a_namespace_loads_its_own_part(here: Repository, far_engine: Engine, bucket: Path, tmp_path: Path) -> None:
    own = here.within("acme")
    tree(own, TEXT, 1)
    own.push(all=True)
    with thaw.open(tmp_path / "there", engine=far_engine, create=True) as there:
        there.add_remote("origin", bucket.as_uri())
        with pytest.raises(NotFound, match="no branch 'fork/0'"):
            there.fork("origin/fork/0", 2, fetch=True)
        with there.within("acme").fork("origin/fork/0", 2, fetch=True) as kids:
            assert all(proof is not None and proof.hit for proof in kids.proofs)
            kids[0].commit("further", branch="further")
        assert there.store.refs() == [] and there.fsck().ok
    assert not arriving._OPEN
