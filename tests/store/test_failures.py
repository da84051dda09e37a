"""Everything fails clearly: a full disk, a read-only folder, a lost race, another file system, a forked process.

The disk is really full and the folder really read-only: small tmpfs mounts, where this user may mount; file size
limits everywhere.
"""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import resource
import shutil
import sqlite3
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_sessions import commit, read_all, tokens

from thaw.core.errors import CorruptDatabase, RefConflict, StorageFailed
from thaw.core.objects import Commit
from thaw.store import RefUpdate, Store, fsck, reserve
from thaw.store.filesystem import is_network, mount_type


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a tmpfs; the file size limit is tested instead")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_named_and_loses_nothing(small_disk: Path) -> None:
    """Commits until the disk is full, at whatever step that is; then checks, makes room, and goes on."""
    store = Store.init(small_disk / "repo")
    stored: list[str] = []
    ballast = small_disk / "ballast"
    failures: set[str] = set()
    for step in range(40):
        ballast.write_bytes(b"")
        room = os.statvfs(small_disk)
        ballast.write_bytes(bytes(max(0, room.f_bavail * room.f_bsize - step * 4096)))
        try:
            parents = (stored[-1],) if stored else ()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # refs.json could not follow; the commit is on disk
                stored.append(commit(store, tokens(150, seed=step), parents=parents))
        except StorageFailed as error:
            assert "full" in str(error) and str(small_disk) in str(error) and "thaw gc" in str(error)
            failures.add(str(error).split(":")[0])
        assert not [name for name in os.listdir(store.packs) if name.endswith(".tmp")]
        assert list(store.commits()) == stored
        if stored:
            assert store.ref("main").target == stored[-1]
    assert failures and stored
    for one in stored:
        read_all(store, one)
    ballast.unlink()
    assert [p for p in fsck(store.path).problems if p.file != "refs.json"] == []
    commit(store, tokens(150, seed=99))
    store.gc()
    assert fsck(store.path).problems == []
    store.close()


@pytest.fixture
def larger_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB: ext4 on a file where this user may mount one, else a tmpfs."""
    folder, image = tmp_path / "disk", tmp_path / "image"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(24 << 20)
    mkfs = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or "false"
    made = subprocess.run([mkfs, "-q", "-O", "^has_journal", "-m", "0", str(image)], capture_output=True)
    mounted = (
        made.returncode
        or subprocess.run(["mount", "-o", "loop", str(image), str(folder)], capture_output=True).returncode
    )
    if mounted:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)]).returncode
    if mounted:
        pytest.skip("this user may mount no file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Takes every byte that is free."""
    with (folder / "ballast").open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 512):
            while True:
                try:
                    if not file.write(bytes(size)):
                        break
                except OSError:
                    break


@pytest.mark.parametrize("opened_anew", [False, True], ids=["open", "opened-anew"])
def test_a_full_disk_has_a_way_out(larger_disk: Path, opened_anew: bool) -> None:
    """Nothing is free, not a byte: a branch is deleted, gc frees what it held, and commits go on."""
    path = larger_disk / "repo"
    store = Store.init(path)
    store.require_room()
    kept = commit(store, tokens(300), branch="kept")
    for number in range(12):
        commit(store, tokens(4000, seed=number + 1), branch=f"spare-{number}")
    if opened_anew:
        store.close()
    fill(larger_disk)
    if opened_anew:
        store = Store.open(path)
        fill(larger_disk)
    with pytest.raises(StorageFailed, match=r"full: .* bytes are free.*thaw gc"):
        store.require_room()
    with pytest.raises(StorageFailed, match="full"):
        commit(store, tokens(4000, seed=99), branch="more")
    for number in range(12):
        ref = store.ref(f"spare-{number}")
        assert ref is not None
        store.update_refs(RefUpdate(ref.name, "branch", None, ref.target, "deleted"))
    fill(larger_disk)
    report = store.gc(keep_reflog_s=0)
    assert report.commits_removed == 12 and report.nbytes_freed > 2 << 20
    read_all(store, kept)
    assert [problem for problem in fsck(path).problems if problem.file != "refs.json"] == []
    (larger_disk / "ballast").unlink()
    store.require_room()
    commit(store, tokens(4000, seed=99), branch="more")
    assert fsck(path).problems == []
    store.close()


def test_a_reader_wears_nothing_off_the_reserve_of_a_full_disk(larger_disk: Path) -> None:
    """Somebody else takes every byte as soon as it is free."""
    path = larger_disk / "repo"
    with Store.init(path) as store:
        store.require_room()
        commit(store, tokens(300))
        commit(store, tokens(300, seed=1), branch="spare")
    whole = (path / reserve.NAME).stat().st_size
    for _ in range(12):
        fill(larger_disk)
        with Store.open(path) as store:
            fill(larger_disk)
            assert len(store.refs()) == 2
        assert (path / reserve.NAME).stat().st_size >= whole - 2 * reserve.OPENING
        fill(larger_disk)
        assert fsck(path).ok and fsck(path, deep=False).ok
    fill(larger_disk)
    with Store.open(path) as store:
        store.update_refs(RefUpdate("spare", "branch", None, "any", "deleted"))
        assert store.gc(keep_reflog_s=0).commits_removed == 1


def test_the_reserve_gives_up_no_more_than_is_needed(tmp_path: Path) -> None:
    given = []

    def work() -> str:
        given.append((tmp_path / reserve.NAME).stat().st_size)
        if len(given) < 3:
            raise StorageFailed("full") from OSError(errno.ENOSPC, "no space")
        return "done"

    reserve.keep(tmp_path)
    assert reserve.with_room(tmp_path, work, 100_000) == "done"
    assert given == [reserve.NBYTES, reserve.NBYTES - 100_000, reserve.NBYTES - 500_000]
    assert (tmp_path / reserve.NAME).stat().st_size == reserve.NBYTES


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_a_reserve_that_is_no_file_is_named_and_the_disk_is_not_called_full(tmp_path: Path, kind: str) -> None:
    with Store.init(tmp_path / "repo") as store:
        place = store.path / reserve.NAME
        {"folder": place.mkdir, "pipe": lambda: os.mkfifo(place), "link": lambda: place.symlink_to("/dev/zero")}[kind]()
        with pytest.raises(StorageFailed, match=r"no file.*Remove it") as caught:
            store.require_room()
        assert "full" not in str(caught.value)
        commit(store, tokens(300))
        assert store.gc().commits_removed == 0
    assert fsck(store.path).ok


def test_a_writer_is_told_of_a_full_disk_before_it_generates(larger_disk: Path) -> None:
    import thaw

    engine = thaw.load_engine("fake", max_model_len=1 << 20)
    with engine, thaw.open(larger_disk / "repo", engine=engine, create=True) as repo:
        repo.require_room(num_tokens=100)
        with pytest.raises(StorageFailed, match=r"are needed to commit.*thaw gc"):
            repo.require_room(num_tokens=1 << 20)
        fill(larger_disk)
        with pytest.raises(StorageFailed, match="are needed to commit"):
            repo.require_room()


def test_a_full_disk_at_init_is_named(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(3 << 20))
    with pytest.raises(StorageFailed, match="full"):
        Store.init(small_disk / "repo")
    (small_disk / "ballast").unlink()
    with Store.init(small_disk / "repo") as store:
        commit(store, tokens(300))


def test_a_read_only_file_system_is_named(small_disk: Path) -> None:
    with Store.init(small_disk / "repo") as store:
        first = commit(store, tokens(300))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with Store.open(small_disk / "repo") as store:
        read_all(store, first)
        with pytest.raises(StorageFailed, match=r"read-?only"):
            commit(store, tokens(310))
        with pytest.raises(StorageFailed, match=r"read-?only"):
            store.gc()
    with pytest.raises(StorageFailed, match="read-only"):
        Store.init(small_disk / "other")
    assert fsck(small_disk / "repo").ok


def test_a_repository_of_an_older_format_opens_on_a_read_only_file_system(small_disk: Path) -> None:
    golden = Path(__file__).parents[1] / "golden"
    shutil.copytree(golden / "format-1", small_disk / "repo")
    ids = json.loads((golden / "format-1.json").read_text())["ids"]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with Store.open(small_disk / "repo") as store:
        assert [entry.new for entry in store.reflog("main")] == [ids["merge"], ids["first"]]
        read_all(store, ids["merge"])
        assert store.recorders(store.get_as(ids["fork"], Commit).state) == [ids["fork"]]
        for write in (
            lambda: store.update_refs(RefUpdate("new", "branch", ids["first"], None, "made")),
            lambda: store.update_refs(RefUpdate("main", "branch", None, "any", "deleted")),
            lambda: store.set_setting("key", "value"),
            lambda: store.set_head("new"),
            store.begin,
            store.gc,
        ):
            with pytest.raises(StorageFailed, match=r"read-?only"):
                write()
        assert store.ref("new") is None and store.get_setting("key") is None and store.head == "fork"
    assert fsck(small_disk / "repo").problems == []


@pytest.mark.parametrize(("limit", "says"), [(200_000, "ulimit -f"), (20_000, "space")])
def test_a_file_size_limit_is_named_and_leaves_nothing(tmp_path: Path, limit: int, says: str) -> None:
    store = Store.init(tmp_path / "repo")
    first = commit(store, tokens(300))
    before = sorted(os.listdir(store.packs))
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            commit(store, tokens(3000, seed=1))
        except StorageFailed as error:
            os._exit(0 if says in str(error) else 2)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sorted(os.listdir(store.packs)) == before
    assert store.ref("main").target == first
    assert fsck(store.path).ok


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    store = Store.init(tmp_path / "repo")
    store.packs.chmod(0o500)
    with pytest.raises(StorageFailed, match="permission denied"):
        commit(store, tokens(300))
    store.packs.chmod(0o700)
    assert fsck(store.path).ok


def test_a_folder_that_another_user_owns_is_named(tmp_path: Path) -> None:
    """As root, by becoming somebody else in a child process."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    store = Store.init(tmp_path / "repo")
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        try:
            Store.open(tmp_path / "repo")
        except StorageFailed:
            os._exit(0)
        except BaseException as error:  # noqa: BLE001
            os.write(2, repr(error).encode())
            os._exit(2)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    store.close()


def _race(path: Path, seed: int, base: str, barrier, pipe) -> None:  # type: ignore[no-untyped-def]
    with Store.open(path) as store:
        barrier.wait()
        try:
            pipe.send(("won", commit(store, tokens(400, seed=seed), expect=base, parents=(base,)), ""))
        except RefConflict as error:
            kept = store.reflog("main", kept=True)
            mine = [e.new for e in kept if not e.moved]
            pipe.send(("lost", mine, str(error)))


def test_of_two_processes_committing_to_one_branch_one_wins_and_both_keep_their_commit(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    store = Store.init(tmp_path / "repo")
    base = commit(store, tokens(300))
    barrier = spawn.Barrier(2)
    pipes = [spawn.Pipe() for _ in range(2)]
    racers = [spawn.Process(target=_race, args=(store.path, 7 + i, base, barrier, pipes[i][1])) for i in range(2)]
    for racer in racers:
        racer.start()
    outcomes = {outcome: (value, text) for outcome, value, text in (pipe.recv() for pipe, _ in pipes)}
    for racer in racers:
        racer.join()
    assert set(outcomes) == {"won", "lost"}
    winner = outcomes["won"][0]
    (loser,), text = outcomes["lost"]
    assert store.ref("main").target == winner
    assert "is kept" in text and loser[3:13] in text and "thaw branch NAME" in text
    store.gc(keep_reflog_s=3600)
    for one in (winner, loser):
        read_all(store, one)
        assert store.get_as(one, Commit).parents == (base,)
    store.update_refs(RefUpdate("mine", "branch", loser, None, "what the message says"))
    store.gc(keep_reflog_s=0)
    read_all(store, loser)


def test_a_forked_process_goes_on_with_connections_of_its_own(tmp_path: Path) -> None:
    store = Store.init(tmp_path / "repo")
    first = commit(store, tokens(300))
    with store.begin() as tx:
        pid = os.fork()
        if pid == 0:
            try:
                second = commit(store, tokens(310), expect=first, parents=(first,))
                read_all(store, second)
                tx.put(store.get(first))
            except BaseException as error:  # noqa: BLE001
                os._exit(0 if "belongs to the process" in str(error) else 2)
            os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        tx.put(store.get(first))
        tx.commit()
    assert store.ref("main").target != first
    assert fsck(store.path).ok


MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
40 27 0:44 / /mnt/data rw shared:3 - nfs4 server:/x rw
41 40 0:45 / /mnt/data/local rw - xfs /dev/vdb rw
42 27 0:46 / /mnt/with\\040space rw - fuse.sshfs me@there: rw
"""


@pytest.mark.parametrize(
    ("path", "kind", "refused"),
    [
        ("/home/me", "ext4", False),
        ("/mnt/data/runs", "nfs4", True),
        ("/mnt/database", "ext4", False),
        ("/mnt/data/local/runs", "xfs", False),
        ("/mnt/with space/x", "fuse.sshfs", True),
    ],
)
def test_a_network_file_system_is_recognised(path: str, kind: str, refused: bool) -> None:
    assert mount_type(Path(path), MOUNTS) == kind
    assert is_network(kind) is refused


def test_a_change_that_is_on_disk_does_not_fail_for_its_backup(tmp_path: Path) -> None:
    """Whatever is wrong with what the backup is made from."""
    with Store.init(tmp_path / "repo") as store:
        first = commit(store, tokens(300))
        with contextlib.closing(sqlite3.connect(store.database.path, isolation_level=None)) as connection:
            connection.execute("INSERT INTO settings VALUES ('user.x', 'y', 'no checksum')")
        with pytest.warns(RuntimeWarning, match=r"refs\.json could not be brought up to date"):
            second = commit(store, tokens(310), base=first, parents=(first,))
        with pytest.warns(RuntimeWarning, match=r"refs\.json could not be brought up to date"):
            store.update_refs(RefUpdate("more", "branch", second, None, "made"))
        with pytest.warns(RuntimeWarning, match=r"refs\.json could not be brought up to date"):
            store.set_head("more")
        assert {ref.name: ref.target for ref in store.refs()} == {"main": second, "more": second}
        assert store.head == "more"
    assert fsck(tmp_path / "repo", rebuild=True).ok
    with Store.open(tmp_path / "repo") as store:
        assert {ref.name: ref.target for ref in store.refs()} == {"main": second, "more": second}


def test_a_database_that_is_a_folder_or_empty_is_corrupt(tmp_path: Path) -> None:
    for number, damage in enumerate((lambda p: p.mkdir(), lambda p: p.touch())):
        store = Store.init(tmp_path / str(number))
        store.close()
        (store.path / "thaw.db").unlink()
        damage(store.path / "thaw.db")
        with pytest.raises((CorruptDatabase, StorageFailed)):
            Store.open(store.path)
