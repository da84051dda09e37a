"""A pool under random kills, hangs and cancels, against the same rounds undisturbed.

`disturb` runs rounds from a few points while another thread does harm, and compares what came with what came without.
Needs a pool of local processes, for it kills them.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import stat
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from thaw.core.errors import Cancelled
from thaw.core.sampling import Sampling
from thaw.pool import BranchResult, ForkPool, Snapshot

LIMIT_S = 1500.0
"""For one round: both workers may have to boot again, on a busy machine."""
Bits = tuple[tuple[int, ...], tuple[str, ...]]


class Process(msgspec.Struct, frozen=True):
    """What a process holds of the machine."""

    pid: int
    resident_kib: int
    open_files: int


class Footprint(msgspec.Struct, frozen=True):
    """A look at the client, the workers that are there, and the pool's files in shared memory."""

    round: int
    client: Process
    workers: dict[str, Process]
    shared_files: int
    shared_nbytes: int


@dataclass
class Soak:
    """What happened. `footprints`: ten looks in the run, and one at its end."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    footprints: list[Footprint] = field(default_factory=list)


def bits(result: BranchResult) -> Bits:
    return result.token_ids, tuple(value.hex() for value in result.logprobs)


def undisturbed(pool: ForkPool, points: Sequence[Snapshot], n: int, sampling: Sampling) -> list[list[Bits]]:
    return [[bits(result) for result in pool.fork(point, n, sampling, keep=False)] for point in points]


def disturb(
    pool: ForkPool, points: Sequence[Snapshot], reference: list[list[Bits]], sampling: Sampling, *,
    rounds: int, seed: int, harms: Sequence[str] = ("kill", "hang", "cancel", "none", "none"), logprobs: bool = True,
) -> Soak:  # fmt: skip
    """`rounds` rounds, each with one harm drawn by `seed`. A branch that was not cancelled must come as it did before,
    once. `logprobs` False compares tokens alone, where another batch shape may give other last bits."""
    draw, soak, before = random.Random(seed), Soak(), pool.stats().num_retries
    for number in range(rounds):
        which = draw.randrange(len(points))
        harm = draw.choice(list(harms))
        _one(pool, points[which], reference[which], sampling, harm, draw, soak, logprobs, f"round {number}, {harm}")
        if number % max(1, rounds // 10) == 0 or number == rounds - 1:
            soak.footprints.append(footprint(pool, number))
    soak.counts["retries"] = pool.stats().num_retries - before
    return soak


def _one(
    pool: ForkPool, point: Snapshot, expected: list[Bits], sampling: Sampling, harm: str, draw: random.Random,
    soak: Soak, logprobs: bool, what: str,
) -> None:  # fmt: skip
    round_ = pool.submit(point, len(expected), sampling, keep=draw.random() < 0.3)
    cancelled = draw.randrange(len(expected)) if harm == "cancel" else None
    doing = threading.Timer(draw.random() * 0.3, _harm, (pool, round_, harm, cancelled, soak))
    doing.start()
    results = round_.result(LIMIT_S, errors="return")
    doing.cancel()
    doing.join()
    soak.counts["rounds"] += 1
    soak.counts["branches"] += len(results)
    soak.counts["answered twice"] += round_.num_dropped
    for result, wanted in zip(results, expected, strict=True):
        if isinstance(result.error, Cancelled) and result.index == cancelled:
            soak.counts["cancelled"] += 1
        elif result.error is not None:
            soak.wrong.append(f"{what}: branch {result.index} failed: {result.error}")
        elif (bits(result) if logprobs else result.token_ids) != (wanted if logprobs else wanted[0]):
            soak.wrong.append(f"{what}: branch {result.index} differs")
        else:
            soak.counts["equal"] += 1


def _harm(pool: ForkPool, round_: object, harm: str, cancelled: int | None, soak: Soak) -> None:
    if cancelled is not None:
        round_.cancel(cancelled)  # type: ignore[attr-defined]
        return
    busy = [worker.pid for worker in pool.stats().workers if worker.running and worker.pid is not None]
    if harm in ("kill", "hang") and busy:
        try:
            os.kill(busy[0], signal.SIGKILL if harm == "kill" else signal.SIGSTOP)
            soak.counts[harm] += 1
        except ProcessLookupError:
            soak.counts["too late"] += 1


def footprint(pool: ForkPool, number: int) -> Footprint:
    """Of a pool on Linux, after round `number`. A worker that has ended just then, or boots, is not in it."""
    stats = pool.stats()
    workers = {w.name: found for w in stats.workers if w.pid is not None and (found := process(w.pid)) is not None}
    client = process(os.getpid())
    assert client is not None
    sizes = [size for path in Path(stats.arena.path).parent.rglob("*") if (size := _size(path)) is not None]
    return Footprint(number, client, workers, len(sizes), sum(sizes))


def process(pid: int) -> Process | None:
    """None when it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return Process(pid, pages * os.sysconf("SC_PAGESIZE") // 1024, len(os.listdir(f"/proc/{pid}/fd")))
    return None


def _size(path: Path) -> int | None:
    """Bytes of a file; None for what is none, or is gone."""
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        return found.st_size if stat.S_ISREG(found.st_mode) else None
    return None
