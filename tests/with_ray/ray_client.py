"""A client that is killed: makes a pool on a Ray cluster, says what belongs to it, and waits."""

from __future__ import annotations

import sys
import time

import thaw
from thaw.cluster import RayCluster


def main() -> None:
    pool = thaw.ForkPool("fake", backend=RayCluster(address=sys.argv[1], lease_s=2.0), workers=2, step_s=0.01)
    ids = pool.encode("a document " * 50)
    pool.snapshot(ids)
    pool.submit(ids, 8, thaw.Sampling(max_tokens=20_000, ignore_eos=True), spread=2)
    daemons = [node.daemon for node in pool._backend.nodes.all() if node.daemon is not None]  # type: ignore[attr-defined]
    pids = [worker.pid for worker in pool.stats().workers if worker.pid is not None]
    print(*(one.folder for one in daemons), "|", *pids, *(one.pid for one in daemons), flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
