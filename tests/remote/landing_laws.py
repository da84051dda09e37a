"""What holds of every engine in processes of its own that forks a remote's branch while it is downloaded."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hosts import files

import thaw
from thaw import Sampling
from thaw.core.errors import CorruptBlob, RemoteUnreachable, ThawError
from thaw.engines.base import Completion, Engine
from thaw.remote import landing
from thaw.remote.folder import FolderBucket
from thaw.repo import Repository

GREEDY = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=3)
TOKENS = [(7 * i * i + i) % 200 + 20 for i in range(300)]


class Held(FolderBucket):
    """What lies behind 60 % of a pack waits until another process has a progress file of `packs` open."""

    def __init__(self, root: Path, packs: Path, ends: Callable[[], None] = lambda: None) -> None:
        super().__init__(root)
        self._packs, self._ends, self.seen, self.late = packs, ends, 0, 0

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        found = list(self._packs.glob(f"{landing.PREFIX}*"))
        if found and ranges[0][0] > 0.6 * (self.size(key) or 1):
            self._wait(found[0])
            self._ends()
        return super().read_ranges(key, ranges)

    def _wait(self, progress: Path) -> None:
        until = time.monotonic() + 20
        while not opened_elsewhere(progress):
            if time.monotonic() > until:
                self.late += 1
                return
            time.sleep(0.01)
        self.seen += 1


def opened_elsewhere(path: Path) -> bool:
    """Whether another process has the file open."""
    for process in Path("/proc").glob("[0-9]*"):
        if process.name != str(os.getpid()):
            with contextlib.suppress(OSError):
                if any(os.readlink(one) == str(path) for one in (process / "fd").iterdir()):
                    return True
    return False


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many requests and local packs as a large session has."""
    for name, value in {"RUN_BYTES": 8192, "GAP_BYTES": 0, "SHARED_BYTES": 16384, "LOCAL_PACK_BYTES": 20000}.items():
        monkeypatch.setattr(f"thaw.remote.fetch.{name}", value)


@pytest.fixture
def pushed(tmp_path: Path, engine: Engine) -> Iterator[Repository]:
    """`main` in the remote."""
    with thaw.open(tmp_path / "here", engine=engine, create=True) as repo:
        repo.add_remote("origin", (tmp_path / "bucket").as_uri())
        with repo.session(seed=1) as session:
            session.append(token_ids=TOKENS)
            session.commit("read", branch="main")
        repo.push("main")
        yield repo


@pytest.fixture
def there(tmp_path: Path, engine: Engine) -> Iterator[Repository]:
    with thaw.open(tmp_path / "there", engine=engine, create=True) as repo:
        repo.add_remote("origin", (tmp_path / "bucket").as_uri())
        yield repo


def bits(done: Sequence[Completion]) -> list[tuple[object, object]]:
    return [(one.token_ids, one.logprobs) for one in done]


def through(monkeypatch: pytest.MonkeyPatch, bucket: FolderBucket) -> None:
    monkeypatch.setattr("thaw.remote.address.open_bucket", lambda address: bucket)


class LandingTests:
    """Subclass it where there is a fixture `engine`."""

    def test_the_engine_reads_while_the_last_bytes_are_still_to_come(
        self, pushed: Repository, there: Repository, tmp_path: Path, pieces: None, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        held = Held(tmp_path / "bucket", there.store.packs)
        through(monkeypatch, held)
        with caplog.at_level(logging.WARNING, "thaw.repo.arriving"), there.fork("origin/main", 2, fetch=True) as kids:
            assert held.seen and not held.late
            assert not caplog.records, "what arrived was read as it arrived"
            assert all(proof is not None and proof.hit and not proof.num_recomputed_tokens for proof in kids.proofs)
            found = bits(kids.generate("And then?", GREEDY))
            kids[0].commit("further", branch="further")
        with pushed.fork("main", 2) as kids:
            assert found == bits(kids.generate("And then?", GREEDY)), "the bits of those at home"
        assert there.fsck().ok and not list(there.store.packs.glob("*.tmp"))

    def test_an_engine_that_cannot_loads_after_the_download(
        self, pushed: Repository, there: Repository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As one whose environment has an older thaw; and the negative control of the one above."""
        monkeypatch.setattr(landing, "SCHEME", "unheard-of")
        with caplog.at_level(logging.WARNING, "thaw.repo.arriving"), there.fork("origin/main", 2, fetch=True) as kids:
            assert [record.levelname for record in caplog.records] == ["WARNING"], "and says so"
            assert all(proof is not None and proof.hit for proof in kids.proofs)

    def test_a_download_that_breaks_off_ends_the_session_and_not_the_engine(
        self, pushed: Repository, there: Repository, tmp_path: Path, pieces: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def ends() -> None:
            raise RemoteUnreachable("the line is dead")

        with monkeypatch.context() as patch:
            through(patch, Held(tmp_path / "bucket", there.store.packs, ends))
            with pytest.raises(RemoteUnreachable, match="the line is dead"):
                there.fork("origin/main", 2, fetch=True)
        assert there.fsck().ok and there.store.ref("origin/main") is None
        with there.fork("origin/main", 2, fetch=True) as kids:
            assert all(proof is not None and proof.hit for proof in kids.proofs)

    def test_a_wrong_byte_in_the_remote_is_named(self, pushed: Repository, there: Repository, tmp_path: Path) -> None:
        for path in files(tmp_path / "bucket", "packs"):
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        with pytest.raises(CorruptBlob, match="not what was pushed"):
            there.fork("origin/main", 2, fetch=True)
        assert there.store.ref("origin/main") is None

    def test_others_go_on_while_one_waits_for_its_bytes(
        self, pushed: Repository, there: Repository, tmp_path: Path, pieces: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A session of the same engine generates while a download holds still, and commits."""
        go, done = threading.Event(), list[str]()

        def ends() -> None:
            assert go.wait(60)

        through(monkeypatch, Held(tmp_path / "bucket", there.store.packs, ends))

        def fork() -> None:
            try:
                with there.fork("origin/main", 1, fetch=True) as kids:
                    assert kids.proofs[0] is not None and kids.proofs[0].hit
                done.append("forked")
            except (ThawError, AssertionError) as error:
                done.append(repr(error))

        thread = threading.Thread(target=fork)
        thread.start()
        with pushed.session("main") as other:
            assert other.proof is not None and other.proof.hit, "another session is loaded meanwhile"
            other.generate("Why?", GREEDY)
            other.commit("meanwhile", branch="meanwhile")
        assert not done
        go.set()
        thread.join(60)
        assert done == ["forked"]
