"""Rounds under random kills, hangs and cancels: no branch lost, none answered twice, all as undisturbed."""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import thaw
from thaw import Sampling
from thaw import receipt as r
from thaw.pool import ForkPool
from thaw.receipt.machine import this_machine
from thaw.testing.pool_soak import Footprint, Soak, disturb, undisturbed

CLIENT_KIB, WORKER_KIB, CALM_KIB = 32 * 1024, 16 * 1024, 8 * 1024
OPEN_FILES, SHARED_FILES, SHARED_NBYTES = 16, 16, 8 << 20
"""What may be more, and is still flat: resident memory over the third look (CALM_KIB: of one process, over the calm
rounds), handles, and files in shared memory with their bytes (SQLite's log there grows by each load until it is folded,
at 4 MiB)."""
SAMPLING = Sampling(temperature=0.9, max_tokens=24, ignore_eos=True)


def run(rounds: int, seed: int, calm: int) -> tuple[Soak, Soak]:
    """Disturbed rounds, then `calm` ones in a pool of their own, in which no process ends, so that each is watched for
    some time. (A pool gives up a worker that fails too often: waiting there for two might never end.)"""
    return life(rounds, seed), life(calm, seed, harms=("cancel", "none"))


def life(rounds: int, seed: int, **more: Any) -> Soak:
    with ForkPool("fake", workers=2, step_s=0.005, stall_s=1.5, heartbeat_s=1.5, retries=6, max_batch=4) as pool:
        points = []
        for number in range(4):
            session = pool.session(seed=number)
            session.append(f"Document {number}. " * 30)
            points.append(pool.snapshot(session))
            session.close()
        reference = undisturbed(pool, points, 6, SAMPLING)
        pool.fork(points[0], 6, SAMPLING, spread=2, keep=False)
        return disturb(pool, points, reference, SAMPLING, rounds=rounds, seed=seed, **more)


def check_flat(disturbed: Soak, calm: Soak) -> None:
    looks = disturbed.footprints[2:] + calm.footprints
    clients = [look.client for look in looks]
    assert max(c.resident_kib for c in clients) - clients[0].resident_kib < CLIENT_KIB, clients
    assert max(c.open_files for c in clients) - min(c.open_files for c in clients) <= OPEN_FILES, clients
    workers = [worker for look in looks for worker in look.workers.values()]
    assert max(w.resident_kib for w in workers) - workers[0].resident_kib < WORKER_KIB, workers
    assert max(w.open_files for w in workers) - workers[0].open_files <= OPEN_FILES, workers
    assert max(look.shared_files for look in looks) - looks[0].shared_files <= SHARED_FILES, looks
    assert max(look.shared_nbytes for look in looks) - looks[0].shared_nbytes <= SHARED_NBYTES, looks
    first, last = calm.footprints[1].workers, calm.footprints[-1].workers
    assert len(first) == 2 and {w.pid for w in first.values()} == {w.pid for w in last.values()}
    for name, worker in last.items():
        assert worker.resident_kib - first[name].resident_kib < CALM_KIB, (first, last)


def check(soak: Soak, rounds: int) -> None:
    assert not soak.wrong, soak.wrong[:5]
    assert soak.counts["rounds"] == rounds
    assert soak.counts["answered twice"] == 0
    assert soak.counts["equal"] + soak.counts["cancelled"] == soak.counts["branches"] == 6 * rounds


def receipt_of(disturbed: Soak, calm: Soak, seed: int, seconds: float) -> r.Receipt:
    """Of a run that held: what was counted, and every look."""
    text = "rounds of 6 branches in a pool of 2 workers, "
    arms = (
        r.Arm(
            name="disturbed", title="disturbed rounds", text=f"{text}under random kill -9, SIGSTOP and cancels",
            rounds=tuple(map(row, disturbed.footprints)),
        ),
        r.Arm(
            name="calm", title="calm rounds after them", text=f"{text}with cancels alone, so that no process ends",
            rounds=tuple(map(row, calm.footprints)),
        ),
    )  # fmt: skip
    limits = {
        "client_kib": CLIENT_KIB, "worker_kib": WORKER_KIB, "worker_kib_in_calm_rounds": CALM_KIB,
        "open_files": OPEN_FILES, "shared_files": SHARED_FILES, "shared_nbytes": SHARED_NBYTES,
    }  # fmt: skip
    counted = {
        f"{name}.{what.replace(' ', '_')}": count
        for name, soak in (("disturbed", disturbed), ("calm", calm))
        for what, count in sorted(soak.counts.items())
    }
    units = {"client_kib": "KiB", "worker_kib": "KiB", "worker_open_files": "files", "shared_nbytes": "bytes"}
    return r.make(
        kind="soak.pool", command="THAW_SOAK=1 pytest -m soak tests/pool/test_pool_soak.py",
        versions={"thaw": thaw.__version__, "python": platform.python_version()}, machine=this_machine(), model=None,
        parameters={
            "engine": "fake", "seed": seed, "seconds": round(seconds, 1), **counted,
            **{f"may_grow.{name}": limit for name, limit in limits.items()},
        },
        arms=arms,
        derived=[
            r.median(f"{arm.name}.{value}", f"{arm.title}: {value}", unit, r.Term(arm=arm.name, value=value))
            for arm in arms
            for value, unit in units.items()
        ],
        notes=(
            "Every branch that was not cancelled came once, equal in every bit to the undisturbed run.",
            "A row is a look after the round of its number; worker_ values are the largest of the workers there.",
        ),
    )  # fmt: skip


def row(look: Footprint) -> r.Round:
    workers = list(look.workers.values())
    found = {
        "client_kib": look.client.resident_kib, "client_open_files": look.client.open_files,
        "num_workers": len(workers), "worker_kib": max((w.resident_kib for w in workers), default=0),
        "worker_open_files": max((w.open_files for w in workers), default=0),
        "shared_files": look.shared_files, "shared_nbytes": look.shared_nbytes,
    }  # fmt: skip
    return r.Round(pair=look.round, values={name: float(value) for name, value in found.items()})


@pytest.mark.slow("forty rounds, thirty of them with kills and hangs")
def test_thirty_disturbed_rounds_come_as_undisturbed_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THAW_CACHE_DIR", str(tmp_path))
    soak, calm = run(30, seed := random.getrandbits(30), 10)
    print(seed, dict(soak.counts))
    check(soak, 30)
    check(calm, 10)
    check_flat(soak, calm)
    assert r.verify(r.dumps(receipt_of(soak, calm, seed, 1.0))).problems == ()
    assert soak.counts["kill"] + soak.counts["hang"] > 0 and soak.counts["retries"] > 0


@pytest.mark.soak("six hundred rounds", receipt="pool-soak", covers=("src/thaw/pool", "src/thaw/testing/pool_soak.py"))
@pytest.mark.skipif(not os.environ.get("THAW_SOAK"), reason="set THAW_SOAK=1 (or `make soak`)")
@pytest.mark.timeout(2 * 3600)
def test_five_hundred_disturbed_rounds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, soak_receipt: Callable[..., None]
) -> None:
    monkeypatch.setenv("THAW_CACHE_DIR", str(tmp_path))
    began, seed, rounds, calm_rounds = time.time(), random.getrandbits(30), 500, 100
    soak, calm = run(rounds, seed, calm_rounds)
    check(soak, rounds)
    check(calm, calm_rounds)
    check_flat(soak, calm)
    soak_receipt(made=receipt_of(soak, calm, seed, time.time() - began))
