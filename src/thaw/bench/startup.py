"""What a command costs as a whole process, against Python that does nothing: `python -m thaw.bench.startup [FOLDER]`.

All commands alternate in one run. Prints, for `--help` and each verb that only reads, milliseconds and the ratio to
`python -c pass`: by the wall clock and by CPU time, each the least of all rounds, for what else runs only adds to it.
FOLDER is a repository with two commits at least (default: one is made with the fake engine). `--out FILE` leaves a
receipt: there a ratio is the geometric mean over the rounds, each against the `python -c pass` of its own round. Exit
code 7 where the least CPU time of a command is above the limit.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from thaw import receipt as r
from thaw.bench.told import tell
from thaw.receipt.machine import software, this_machine

LIMIT = 6.0
ROUNDS = 15
BASE = "python -c pass"
COMMANDS = (("--help",), ("log",), ("show",), ("diff", "HEAD~1"), ("branch",), ("tag",), ("reflog",), ("stats",))


class Cost(NamedTuple):
    wall_s: float
    cpu_s: float


def least(costs: Sequence[Cost]) -> Cost:
    return Cost(min(cost.wall_s for cost in costs), min(cost.cpu_s for cost in costs))


def measure(folder: Path, rounds: int = ROUNDS) -> dict[str, list[Cost]]:
    """What each command in `folder`, and `BASE`, cost in each of the alternating rounds."""
    arms = {BASE: [sys.executable, "-c", "pass"]}
    arms |= {f"thaw {' '.join(words)}": [sys.executable, "-m", "thaw.cli", *words] for words in COMMANDS}
    found: dict[str, list[Cost]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, line in arms.items():
            cost = _run(line, folder)
            if number:  # the first one compiles and reads from the disk
                found[name].append(cost)
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


def made_receipt(found: Mapping[str, Sequence[Cost]]) -> r.Receipt:
    """Ratios to `BASE` by the wall clock, which is what a user waits for, and by CPU time."""
    arms = [
        r.Arm(
            name=_id(name), title=name, text="a whole process, its output thrown away",
            rounds=tuple(r.Round(pair=i, values={"wall_s": c.wall_s, "cpu_s": c.cpu_s}) for i, c in enumerate(costs)),
        )
        for name, costs in found.items()
    ]  # fmt: skip
    derived, goals = [], []
    for name in found:
        if name == BASE:
            continue
        for value, clock in (("wall_s", "by the wall clock"), ("cpu_s", "by CPU time")):
            over, under = (r.Term(arm=_id(arm), value=value) for arm in (name, BASE))
            of = f"{_id(name)}.{value.removesuffix('_s')}"
            derived.append(r.ratio(of, f"{name} against {BASE}, {clock}", over, under))
            goals.append(r.at_most(f"{of}.most", f"at most {LIMIT:g} times", of, LIMIT))
    return r.make(
        kind="startup",
        command="python -m thaw.bench.startup --out FILE",
        versions=software("msgspec", "blake3", "click"),
        machine=this_machine(),
        model=None,
        parameters={"limit": LIMIT},
        arms=arms,
        derived=derived,
        goals=goals,
    )


def _id(name: str) -> str:
    return "-".join(word.strip("-~") for word in name.replace("HEAD~1", "").split() if word.strip("-"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the receipt (JSON) to FILE")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="thaw-startup-") as name:
        if told.folder is None:
            _example(Path(name))
        found = measure(told.folder or Path(name), told.rounds)
    base = least(found[BASE])
    for name, costs in found.items():
        cost = least(costs)
        wall, cpu = cost.wall_s / base.wall_s, cost.cpu_s / base.cpu_s
        print(f"{name:18} {cost.wall_s * 1e3:7.1f} ms {wall:5.2f} ×   CPU {cost.cpu_s * 1e3:7.1f} ms {cpu:5.2f} ×")
    if told.out is not None:
        tell(made_receipt(found), told.out)
    return 7 if any(least(costs).cpu_s > LIMIT * base.cpu_s for costs in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
