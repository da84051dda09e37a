"""The guard: a tiny process that cleans up after a pool whose client was killed. A script, standard library only.

It reads lines `+ PID` and `- PID` (host processes that began and ended). At the end of its input, which comes when the
client is gone for whatever reason, it kills what still runs in those processes' sessions and removes the pool's folder.
"""

import contextlib
import os
import shutil
import signal
import sys
import time

GRACE_S = 25.0
"""Hosts close their engines by themselves when the client is gone; after this they are killed."""


def members(leaders: set[int]) -> list[int]:
    """Processes whose session is one of `leaders`."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        if int(fields[3]) in leaders and fields[0] not in (b"Z", b"X"):
            found.append(int(name))
    return found


def wait_or_kill(leaders: set[int], grace_s: float) -> None:
    ends = time.monotonic() + grace_s
    while (alive := members(leaders)) and time.monotonic() < ends:
        time.sleep(0.1)
    for pid in alive:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def main(folders: list[str]) -> None:
    leaders: set[int] = set()
    for line in sys.stdin:
        sign, _, pid = line.strip().partition(" ")
        if sign == "+":
            leaders.add(int(pid))
        elif sign == "-":
            leaders.discard(int(pid))
    wait_or_kill(leaders, GRACE_S if leaders else 0.0)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
