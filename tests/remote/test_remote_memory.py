"""What a push and a fetch hold in memory does not grow with what they move."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
from hosts import commit, kv_of, remote, tokens, wish

from thaw.remote import fetch as fetching
from thaw.remote.fetch import fetch
from thaw.remote.folder import FolderBucket
from thaw.remote.push import push
from thaw.store import Store

PROGRAM = """
import os, sys
from pathlib import Path
from hosts import remote, wish
from thaw.core.canonical import U64
from thaw.core.objects import Commit, Segment, SegmentEntry, SegmentNode, State, Turn, TurnNode
from thaw.core.cache import FullKV
from thaw.core.prefix import chains, extend
from thaw.data.pack import PackItem, write_pack
from thaw.remote.fetch import fetch
from thaw.remote.push import push
from thaw.store import RefUpdate, Store
import msgspec, store_sessions

base, megabytes = Path(sys.argv[1]), int(sys.argv[2])
BLOB = 4 << 20
tokens = tuple(i % 50000 for i in range(megabytes // 4 * 256 + 1))
group = FullKV(name="full", first_layer=0, num_layers=8, num_kv_heads=1, head_dim=512, dtype="bfloat16")
model_of = msgspec.structs.replace(store_sessions.MODEL, groups=(group,), dtype="bfloat16")
store = Store.init(base / "here")
with store.begin() as tx:
    model = tx.put(model_of)
    items = [
        PackItem("", "BF16", (8, 2, 256, 512), BLOB, lambda: os.urandom(BLOB)) for _ in range(megabytes // 4)
    ]
    result = write_pack(store.packs, tx.pack, items)
    tx.add_pack(result.name, result.nbytes, result.blobs)
    chain, entries = chains(model, tokens), []
    for i, place in enumerate(result.blobs):
        window = chain[i]
        segment = Segment(start=i * 256, tokens=tokens[i * 256 : i * 256 + 256], window=window,
                          prefix=extend(window, tokens[i * 256 : i * 256 + 256]), blobs={"full": (place.blob,)})
        entries.append(SegmentEntry(segment=tx.put(segment), start=i * 256, length=256))
    nodes = tuple(tx.put(SegmentNode(entries=tuple(entries[i : i + 64]))) for i in range(0, len(entries), 64))
    turn = tx.put(Turn(kind="prompt", start=0, end=len(tokens), text="t"))
    state = tx.put(State(model=model, num_tokens=len(tokens), num_kv=len(tokens) - 1, nodes=nodes,
                         tail_tokens=tokens[-1:], turn_nodes=(tx.put(TurnNode(entries=(turn,))),), num_turns=1,
                         seed=U64(1), salt="s"))
    commit = tx.put(Commit(state=state, parents=(), message="m", time_ns=U64(1), branch="main"))
    tx.commit(RefUpdate("main", "branch", commit, None, "commit"))

def peak():
    # not getrusage: a process that was just started has its parent's peak there
    status = Path('/proc/self/status').read_text()
    return int(status.partition('VmHWM:')[2].split()[0]) << 10

before = int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
sent = push(store, remote(base / "bucket"), [wish(store, "main")])
pushed = peak() - before
with Store.init(base / "there") as there:
    got = fetch(there, remote(base / "bucket"))
assert got.blob_nbytes == sent.blob_nbytes == megabytes << 20, (got, sent)
print(pushed, peak() - before)
"""
LIMIT = 200 << 20


@pytest.mark.slow("moves half a gigabyte")
def test_what_is_moved_is_not_held(tmp_path: Path) -> None:
    here = Path(__file__).parent
    path = os.pathsep.join(str(one) for one in (here.parents[1] / "src", here, here.parent / "store"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), "512"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pushed, both = map(int, done.stdout.split())
    print(f"512 MiB: push took {pushed >> 20} MiB more, then fetch {both >> 20} MiB")
    assert both <= LIMIT


class _Held(bytearray):
    """Bytes of one answer, for as long as anybody holds a view of them."""


class _Counting(FolderBucket):
    """Counts the bytes of answers that are asked for or held at a time; `most` of them so far."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._lock, self._held, self.most = threading.RLock(), 0, 0

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        ((_, nbytes),) = ranges
        self._count(nbytes)
        (data,) = super().read_ranges(key, ranges)
        held = _Held(data)
        weakref.finalize(held, self._count, -nbytes)
        return [memoryview(held).toreadonly()]

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._held += nbytes
            self.most = max(self.most, self._held)


@pytest.mark.parametrize("runs", [2, 8])
def test_no_more_is_read_ahead_than_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: int) -> None:
    """By count, of each answer until the last view of it is gone. More room is used, too: nothing else is the bound."""
    source = Store.init(tmp_path / "source")
    commit(source, tokens(12_000))
    push(source, remote(tmp_path / "bucket"), [wish(source, "main")])
    source.close()
    monkeypatch.setattr(fetching, "RUN_BYTES", 1 << 14)
    monkeypatch.setattr(fetching, "GAP_BYTES", 0)
    monkeypatch.setattr(fetching, "SHARED_BYTES", 1 << 16)
    monkeypatch.setattr(fetching, "AHEAD_BYTES", room := runs * 2 << 14)
    bucket = _Counting(tmp_path / "bucket")
    with Store.init(tmp_path / "there") as there:
        got = fetch(there, remote(bucket))
    assert got.blob_nbytes > 4 * room
    print(f"{got.blob_nbytes:,} bytes of KV, {bucket.most:,} at most held of {room:,}")
    assert room // 2 < bucket.most <= room


def test_of_large_blobs_one_is_read_while_one_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Store.init(tmp_path / "source")
    commit(source, tokens(6_000))
    push(source, remote(tmp_path / "bucket"), [wish(source, "main")])
    source.close()
    for name, value in (("RUN_BYTES", 1 << 10), ("GAP_BYTES", 0), ("SHARED_BYTES", 1 << 16), ("AHEAD_BYTES", 1 << 10)):
        monkeypatch.setattr(fetching, name, value)
    bucket = _Counting(tmp_path / "bucket")
    with Store.init(tmp_path / "there") as there:
        fetch(there, remote(bucket))
        ref = there.ref("origin/main")
        assert ref is not None
        most = max(map(len, kv_of(there, ref.target).values()))
    assert most > fetching.AHEAD_BYTES
    assert most < bucket.most <= 2 * fetching.WRITERS * most


def test_what_is_read_ahead_is_little() -> None:
    assert fetching.AHEAD_BYTES <= 64 << 20 and fetching.RUN_BYTES * fetching.WRITERS <= fetching.AHEAD_BYTES
