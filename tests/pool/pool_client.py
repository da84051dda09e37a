"""A client that is killed: makes a pool, begins a round, says who belongs to it, and waits."""

from __future__ import annotations

import sys
import time

import thaw


def main() -> None:
    pool = thaw.ForkPool("fake", backend=sys.argv[1], workers=2, step_s=0.01)
    ids = pool.encode("a document " * 50)
    pool.snapshot(ids)
    pool.submit(ids, 8, thaw.Sampling(max_tokens=20_000, ignore_eos=True), spread=2)
    pids = [worker.pid for worker in pool.stats().workers if worker.pid is not None]
    print(pool._home.path, pool._home.spill, *pids, flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
