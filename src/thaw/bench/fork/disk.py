"""Bytes on disk: what forks cost beside one snapshot, and how fast a commit writes against a plain write."""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import time
from pathlib import Path

from thaw.bench import io
from thaw.bench.sample import Sample
from thaw.core import cache
from thaw.core.sampling import Sampling
from thaw.data.files import storage_errors, sync_folder
from thaw.data.tiers.folder import folder_mount
from thaw.engines.base import CapturePlan, Engine
from thaw.repo import Repository, Session
from thaw.store import reserve

_WRITE_BYTES = 8 << 20


def packs_against_files(folder: Path, nbytes: int, rounds: int) -> dict[str, list[Sample]]:
    """The arms of `thaw.bench.io` over about `nbytes`: packs and plain files, written, and read from a cold cache."""
    folder.mkdir(exist_ok=True)
    blob_nbytes = 2 << 20
    found = io.measure(folder, num_blobs=max(1, nbytes // blob_nbytes), blob_nbytes=blob_nbytes, rounds=rounds)
    arms = {
        "pack-write": found.write.thaw, "file-write": found.write.plain,
        "pack-read": found.read.thaw, "file-read": found.read.plain,
    }  # fmt: skip
    return {name: [Sample(values={"mb_per_s": rate}) for rate in rates] for name, rates in arms.items()}


def folder_nbytes(repo: Repository) -> int:
    """Bytes of every file of the repository but its reserve, its write-ahead log emptied into the database first."""
    with contextlib.closing(sqlite3.connect(repo.path / "thaw.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return sum(path.stat().st_size for path in repo.path.rglob("*") if path.is_file() and path.name != reserve.NAME)


def forks(repo: Repository, live: Session, n: int, num_tokens: int) -> Sample:
    """Fork `n` children, let each generate `num_tokens`, commit each to a branch; bytes before and after.

    `own_nbytes`: the KV that the children added (the last token of each has none yet)."""
    kv_token_nbytes = cache.token_nbytes(repo.engine.info.groups)
    snapshot = folder_nbytes(repo)
    started = time.monotonic()
    with live.fork(n) as kids:
        kids.generate(sampling=Sampling(temperature=1.0, max_tokens=num_tokens, ignore_eos=True))
        generated = time.monotonic()
        own = sum(kid.num_kv - live.num_kv for kid in kids) * kv_token_nbytes
        kids.commit("bench")
    return Sample(
        values={
            "snapshot_nbytes": snapshot,
            "total_nbytes": folder_nbytes(repo),
            "own_nbytes": own,
        },
        stages_s={"generate": generated - started, "commit": time.monotonic() - generated},
    )


def capture(engine: Engine, live: Session, folder: Path) -> Sample:
    """Write the whole session into a pack, as a commit does; the pack is removed again. `write_s`: gather, hash, write
    and sync, as the engine timed them; `total_s`: with the cut and the look at the weights before."""
    folder.mkdir(exist_ok=True)
    os.sync()
    started = time.monotonic()
    names = tuple(f"bench-{i}.safetensors" for i in range(engine.info.num_packs))
    plan = CapturePlan(mount=folder_mount(secrets.token_hex(16), folder), packs=names, base=0)
    captured = engine.capture(live.ref, plan).result()
    elapsed = time.monotonic() - started
    for name in names:
        (folder / name).unlink(missing_ok=True)
    stages = captured.stages_s
    values = {
        "write_s": stages["write"] + stages["sync"],
        "total_s": elapsed,
        "write_nbytes": float(captured.nbytes),
    }
    return Sample(values=values, stages_s=stages)


def plain_write(data: memoryview, folder: Path) -> Sample:
    """The same bytes with nothing but write, fsync, rename and fsync of the folder."""
    folder.mkdir(exist_ok=True)
    path = folder / "plain"
    os.sync()
    started = time.monotonic()
    with storage_errors(path, "write"):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            at = 0
            while at < len(data):
                at += os.write(fd, data[at : at + _WRITE_BYTES])
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(path, folder / "plain.done")
        sync_folder(folder)
    elapsed = time.monotonic() - started
    (folder / "plain.done").unlink()
    return Sample(values={"write_s": elapsed, "write_nbytes": len(data)})
