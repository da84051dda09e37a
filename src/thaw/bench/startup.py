"""What a command costs as a whole process, against Python that does nothing: `python -m thaw.bench.startup [FOLDER]`.

Both arms alternate in one run. Prints, for `--help` and each verb that only reads, milliseconds and the ratio to
`python -c pass`: by the wall clock and by CPU time, each the least of all rounds, for what else runs only adds to it.
FOLDER is a repository with two commits at least (default: one is made with the fake engine). Exit code 7 where a ratio
by CPU time is above the limit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

LIMIT = 6.0
ROUNDS = 15
BASE = "python -c pass"
COMMANDS = (("--help",), ("log",), ("show",), ("diff", "HEAD~1"), ("branch",), ("tag",), ("reflog",), ("stats",))


class Cost(NamedTuple):
    wall_s: float
    cpu_s: float

    def least(self, other: Cost) -> Cost:
        return Cost(min(self.wall_s, other.wall_s), min(self.cpu_s, other.cpu_s))


def measure(folder: Path, rounds: int = ROUNDS) -> dict[str, Cost]:
    """The least cost of each command in `folder`, and of `BASE`, over alternating rounds."""
    arms = {BASE: [sys.executable, "-c", "pass"]}
    arms |= {f"thaw {' '.join(words)}": [sys.executable, "-m", "thaw.cli", *words] for words in COMMANDS}
    found: dict[str, Cost] = {}
    for number in range(rounds + 1):
        for name, line in arms.items():
            cost = _run(line, folder)
            if number:  # the first one compiles and reads from the disk
                found[name] = cost.least(found.get(name, cost))
    return found


def _run(line: list[str], folder: Path) -> Cost:
    began = time.perf_counter()
    with subprocess.Popen(line, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(line)} ended with {process.returncode}")
    return Cost(time.perf_counter() - began, used.ru_utime + used.ru_stime)


def _example(folder: Path) -> None:
    import thaw

    with thaw.load_engine("fake") as engine, thaw.init(folder / ".thaw", engine=engine) as repo:
        session = repo.session(seed=1)
        for text in ("a long document", "and what follows"):
            session.append(text)
            session.commit(text, branch="main")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="thaw-startup-") as name:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(name)
        if folder == Path(name):
            _example(folder)
        found = measure(folder)
    base = found[BASE]
    for name, cost in found.items():
        wall, cpu = cost.wall_s / base.wall_s, cost.cpu_s / base.cpu_s
        print(f"{name:18} {cost.wall_s * 1e3:7.1f} ms {wall:5.2f} ×   CPU {cost.cpu_s * 1e3:7.1f} ms {cpu:5.2f} ×")
    return 7 if any(cost.cpu_s > LIMIT * base.cpu_s for cost in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
