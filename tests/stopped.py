"""Run pytest and stop its process now and then, as a crowded machine does; the engines that it started go on.

    python tests/stopped.py tests/pool -m "not soak"

A test that depends on when its own thread gets a turn fails here, and so does code whose client comes too late.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time

RUNS_S, STOPPED_S = (0.3, 1.5), (0.2, 1.0)


def main() -> int:
    dice = random.Random(7)
    with subprocess.Popen([sys.executable, "-m", "pytest", *sys.argv[1:]]) as tests:
        try:
            while tests.poll() is None:
                time.sleep(dice.uniform(*RUNS_S))
                tests.send_signal(signal.SIGSTOP)
                time.sleep(dice.uniform(*STOPPED_S))
                tests.send_signal(signal.SIGCONT)
        except KeyboardInterrupt:
            tests.send_signal(signal.SIGCONT)
    return tests.returncode


if __name__ == "__main__":
    sys.exit(main())
