"""A client that is killed leaves neither process nor shared memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from thaw.pool.shm.dirs import PREFIX, sweep
from thaw.store.leases import start_time

CLIENT = Path(__file__).with_name("pool_client.py")


@pytest.mark.parametrize("backend", ["process", "inline"])
def test_kill_9_of_the_client_leaves_no_process_and_no_shared_memory(backend: str) -> None:
    client = subprocess.Popen([sys.executable, str(CLIENT), backend], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    dirs, spill, *pids = client.stdout.readline().split()
    assert Path(dirs).is_dir() and Path(spill).is_dir()
    assert len(pids) == (2 if backend == "process" else 0)
    assert all(start_time(int(pid)) for pid in pids)
    client.send_signal(signal.SIGKILL)
    client.wait()
    client.stdout.close()
    ends = time.monotonic() + 60
    while time.monotonic() < ends and (Path(dirs).exists() or any(start_time(int(pid)) for pid in pids)):
        time.sleep(0.1)
    assert not Path(dirs).exists() and not Path(spill).exists()
    assert not any(start_time(int(pid)) for pid in pids)


def test_the_next_pool_sweeps_what_a_killed_guard_left(tmp_path: Path) -> None:
    """Folders of processes that have ended go; those of one that runs, and others' files, stay."""
    gone = tmp_path / f"{PREFIX}{os.getuid()}-{os.getpid()}-1-abcd"
    mine = tmp_path / f"{PREFIX}{os.getuid()}-{os.getpid()}-{start_time(os.getpid())}-abcd"
    other = tmp_path / "something-else"
    for folder in (gone, mine, other):
        folder.mkdir()
        (folder / "file").write_bytes(b"x")
    assert sweep(tmp_path) == [gone]
    assert not gone.exists() and (mine / "file").exists() and (other / "file").exists()
