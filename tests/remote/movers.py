"""Writers who move one ref at the same time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from thaw.remote import layout, refs
from thaw.remote.bucket import Bucket
from thaw.remote.layout import NamespaceBucket

TARGET = "b3:" + "1" * 64, layout.manifest_key(0, "b3:" + "2" * 64)


def move_at_once(bucket: Bucket, *, writers: int, moves: int) -> int:
    """Each says in the reason which move it is; the reflog has all of them once, numbered without a gap. Returns how
    often one was too late and tried again."""
    part = NamespaceBucket(bucket, "")

    def work(number: int) -> int:
        late = 0
        for move in range(moves):
            while not refs.move(part, refs.place(part, "branch", "main"), *TARGET, f"{number}/{move}"):
                late += 1
                time.sleep(0)
        return late

    with ThreadPoolExecutor(writers) as threads:
        late = sum(threads.map(work, range(writers)))
    last = refs.read(part, "branch", "main")
    assert last is not None and last.ref.generation == writers * moves
    keys = [layout.reflog_key("branch", "main", number) for number in range(1, writers * moves)]
    said = [part.read(key) for key in keys]
    made = [refs.decode(found.data, "branch", "main").reason for found in said if found is not None]
    assert sorted([*made, last.ref.reason]) == sorted(f"{n}/{move}" for n in range(writers) for move in range(moves))
    return late
