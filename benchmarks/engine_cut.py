"""What the neighbours notice of a snapshot of a working engine: the largest gap between two tokens, in steps.

    python benchmarks/engine_cut.py [--out RECEIPT] [--rounds 7] [--sessions 8] [--tokens 256]
        [--engines transformers,vllm] [--vllm .venv-vllm/bin/python] [--model MODEL] [--note TEXT]

Once for each engine: sessions read a prompt each and decode, each with a client that takes its tokens as they come.
Then rounds of two windows of the same length, in an order that turns:

    cut        all sessions are captured, and the snapshot is durable at the window's end
    no_cut     nothing happens

The gap is the longest time that any client waited for its next token in the window. A step is the median time between
two tokens of a request in the windows without a snapshot. Of each session a cut writes what the one before has not.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

import thaw
from thaw import receipt as r
from thaw.bench.subject import model_of, numerics
from thaw.bench.told import tell
from thaw.core.errors import Cancelled
from thaw.demo.model import ensure_demo_model
from thaw.receipt.machine import software, this_machine
from thaw.snapshot import RequestQueue, snapshot

GOAL_STEPS = 2.0
TITLES = {
    "cut": ("during a snapshot", "From the call of snapshot until it returns."),
    "no_cut": ("without one", "As long, in the same run."),
}
LONG: dict[str, Any] = {"temperature": 0.8, "max_tokens": 3000, "ignore_eos": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "fake": {"step_s": 0.002},
    "transformers": {},
    "vllm": {"enforce_eager": True, "max_model_len": 4096},
    "sglang": {},
}


class Clients:
    """When each token of each request had reached its client."""

    def __init__(self, queue: RequestQueue) -> None:
        self._times: dict[str, list[float]] = {one.id: [] for one in queue.requests()}
        for one in queue.requests():
            threading.Thread(target=self._follow, args=[one.id, one.stream()], daemon=True).start()

    def _follow(self, id: str, pieces: Any) -> None:
        with contextlib.suppress(Cancelled):  # at the end
            for _ in pieces:
                self._times[id].append(time.monotonic())

    def least(self) -> int:
        """News that every client has had."""
        return min(map(len, self._times.values()))

    def gaps(self, start: float, end: float) -> list[float]:
        """Between two pieces of one request, those that lie in [start, end] or reach into it."""
        return [
            b - a for own in self._times.values() for a, b in itertools.pairwise(list(own)) if a < end and b > start
        ]


# -- in a process of its own


def work(name: str, model: str, sessions: int, tokens: int, rounds: int) -> None:
    more = {} if name == "fake" else {"model": model}
    with (
        tempfile.TemporaryDirectory() as folder,
        thaw.load_engine(name, **more, **OPTIONS[name]) as engine,
        thaw.open(Path(folder) / "r", engine=engine, create=True) as repo,
    ):
        engine.identity()  # hashes the weights, once a process
        queue = RequestQueue(repo)
        queue.hold()
        for i in range(sessions):
            session = repo.session(seed=i)
            session.append(token_ids=[100 + (7 * j * j + 13 * i + j) % min(20_000, engine.info.vocab_size - 100)
                                      for j in range(tokens)])  # fmt: skip
            queue.submit(session, sampling=thaw.Sampling(**LONG), id=f"r{i}")
        queue.release()
        clients = Clients(queue)
        while clients.least() < 8:
            time.sleep(0.01)
        length, found = 1.0, []
        for number in range(-1, rounds):  # one round before them, which is not counted
            order = ("cut", "no_cut") if number % 2 else ("no_cut", "cut")
            done: dict[str, Any] = {}
            for arm in order:
                start = time.monotonic()
                if arm == "cut":
                    taken = snapshot(repo, f"cut{number}", queue=queue)
                    assert not taken.missed and len(taken.of("running")) == sessions
                    length = time.monotonic() - start
                else:
                    time.sleep(length)
                end = time.monotonic()
                time.sleep(max(0.3, length / 4))  # so that a gap that reaches into it has ended
                gaps = clients.gaps(start, end)
                done[arm] = {"gap_s": max(gaps), "step_s": statistics.median(gaps), "seconds_s": end - start}
            if number >= 0:
                found.append(done)
        told = {
            "model": msgspec.to_builtins(model_of(engine)),
            "numerics": numerics(engine.info),
            "version": engine.info.version,
        }
        queue.close()
    print(json.dumps({"told": told, "rounds": found}), flush=True)


# -- the receipt


def said_by(name: str, model: str, options: argparse.Namespace) -> dict[str, Any]:
    python = {"vllm": options.vllm, "sglang": options.sglang}.get(name, sys.executable)
    numbers = map(str, (options.sessions, options.tokens, options.rounds))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "src"), "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [python, __file__, "--child", name, model, *numbers], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def arms_of(name: str, rounds: list[dict[str, Any]]) -> list[r.Arm]:
    step = statistics.median(one["no_cut"]["step_s"] for one in rounds)
    return [
        r.Arm(
            name=f"{name}.{arm}",
            title=f"{name}: {title}",
            text=text,
            rounds=tuple(
                r.Round(pair=i, values={**one[arm], "gap_steps": one[arm]["gap_s"] / step})
                for i, one in enumerate(rounds)
            ),
        )
        for arm, (title, text) in TITLES.items()
    ]


def seal(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> r.Receipt:
    arms, derived, goals = list[r.Arm](), [], []
    parameters: dict[str, Any] = {"sessions": options.sessions, "tokens": options.tokens, "rounds": options.rounds}
    for name, said in found.items():
        arms += arms_of(name, said["rounds"])
        for arm, (title, _) in TITLES.items():
            at = f"{name}.{arm}"
            derived += [
                r.median(f"{at}.gap", f"{name}: the largest gap {title}", "steps", r.Term(arm=at, value="gap_steps")),
                r.median(f"{at}.step", f"{name}: a step {title}", "s", r.Term(arm=at, value="step_s")),
            ]
        goals.append(r.at_most(f"{name}.goal", f"{name}: at most two steps", f"{name}.cut.gap", GOAL_STEPS))
        told = said["told"]
        parameters |= {f"{name}.version": told["version"], f"{name}.dtype": told["model"]["dtype"]}
        parameters |= {f"{name}.{key}": value for key, value in told["numerics"].items()}
    return r.make(
        kind="bench.engine-cut",
        command=(
            f"python benchmarks/engine_cut.py --rounds {options.rounds} --sessions {options.sessions} "
            f"--tokens {options.tokens} --engines {','.join(found)}"
        ),
        versions=software("torch", "transformers", "blake3"),
        machine=this_machine(),
        model=msgspec.convert(next(iter(found.values()))["told"]["model"], r.Model),
        parameters=parameters,
        arms=arms,
        derived=derived,
        checks=[],
        goals=goals,
        notes=(
            "Gaps are those of clients in the program that takes the snapshot, not of the engine's own steps.",
            *options.note,
        ),
    )


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--out", type=Path)
    words.add_argument("--model", help="default: the demo's")
    words.add_argument("--rounds", type=int, default=7)
    words.add_argument("--sessions", type=int, default=8)
    words.add_argument("--tokens", type=int, default=256)
    words.add_argument("--engines", default="transformers,vllm")
    words.add_argument("--note", action="append", default=[], help="said in the receipt, of the machine for example")
    words.add_argument("--vllm", default=".venv-vllm/bin/python", help="the Python that has vLLM")
    words.add_argument("--sglang", default=".venv-sglang/bin/python", help="the Python that has SGLang")
    options = words.parse_args()
    model = options.model or str(ensure_demo_model(print))
    found = {}
    for name in options.engines.split(","):
        found[name] = said_by(name, model, options)
        for one in found[name]["rounds"]:
            print(name, {arm: {k: round(v, 3) for k, v in said.items()} for arm, said in one.items()}, flush=True)
    tell(seal(options, found), options.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        name, of_model, *numbers = sys.argv[2:]
        work(name, of_model, *map(int, numbers))
    else:
        main()
