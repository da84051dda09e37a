"""What a small commit costs in a repository with many refs: seconds, and calls of fsync and fdatasync.

    python benchmarks/small_commits.py                        this checkout
    python benchmarks/small_commits.py --tree A --tree B      two checkouts, in alternation

Each round is a process of its own (`PYTHONPATH` is the checkout's `src`) that opens a copy of one repository with
`--refs` branches and commits `--commits` sessions of the fake engine, on no branch as the gateway does, or with
`--branch` on one branch. It prints the median and the 99th percentile, in milliseconds. With `--sync`, one more round
of each runs under strace, which counts the calls.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tree", action="append", type=Path, help="a checkout; may be repeated")
    parser.add_argument("--refs", type=int, default=10_000)
    parser.add_argument("--commits", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--branch", help="commit to this branch instead of none")
    parser.add_argument("--sync", action="store_true", help="count calls with strace")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(commits(args.one, args.commits, args.branch)))
        return
    trees = args.tree or [HERE]
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        make(Path(folder) / "made", args.refs)
        for number in range(args.rounds):
            for tree in trees:
                found = json.loads(run(tree, Path(folder), args))
                text = {what: round(1000 * seconds, 2) for what, seconds in found.items()}
                print(f"round {number} {tree.resolve().name}: {text} ms", flush=True)
        for tree in trees if args.sync else ():
            counted = run(tree, Path(folder), args, ["strace", "-f", "-c", "-e", "trace=fsync,fdatasync"])
            print(f"{tree.resolve().name}: {calls(counted) / args.commits:.2f} fsync and fdatasync a commit")


def run(tree: Path, folder: Path, args: argparse.Namespace, before: list[str] | None = None) -> str:
    """What a round in `tree` prints; under `before`, what that says on stderr."""
    copy = folder / "copy"
    shutil.copytree(folder / "made", copy)
    command = [sys.executable, str(Path(__file__).resolve()), "--one", str(copy), "--commits", str(args.commits)]
    command += ["--branch", args.branch] if args.branch else []
    env = {**os.environ, "PYTHONPATH": str(tree.resolve() / "src")}
    try:
        done = subprocess.run([*(before or []), *command], env=env, check=True, capture_output=True, text=True)
    finally:
        shutil.rmtree(copy)
    return done.stderr if before else done.stdout


def calls(table: str) -> int:
    """Calls of both kinds in what `strace -c` says: time, seconds, microseconds a call, calls, name."""
    return sum(int(number) for number in re.findall(r"^\s*\S+\s+\S+\s+\d+\s+(\d+)\s.*f(?:data)?sync$", table, re.M))


def make(path: Path, num: int) -> None:
    import thaw
    from thaw.store import RefUpdate, Store

    with thaw.load_engine("fake") as engine, thaw.open(path, engine=engine) as repo:
        session = repo.session()
        session.append("the first")
        one = session.commit("first", branch="main").commit
    with Store.open(path) as store:
        store.update_refs(*(RefUpdate(f"s/{i:05}", "branch", one, None, "made") for i in range(num)))


def commits(path: Path, num: int, branch: str | None) -> dict[str, float]:
    import thaw

    taken = []
    with thaw.load_engine("fake") as engine, thaw.open(path, engine=engine) as repo:
        for i in range(num + 5):
            with repo.session(seed=i) as session:
                session.append(f"session {i}: " + "some words here. " * 6)
                began = time.perf_counter()
                session.commit(f"c{i}", branch=branch, expect="any" if branch else "parent")
                taken.append(time.perf_counter() - began)
    taken = sorted(taken[5:])
    return {"p50": taken[len(taken) // 2], "p99": taken[int(len(taken) * 0.99)], "max": taken[-1]}


if __name__ == "__main__":
    main()
