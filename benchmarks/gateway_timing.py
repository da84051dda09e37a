"""Can a tenant tell by the time of a reply that another has stored a prompt? `python benchmarks/gateway_timing.py OUT`

One tenant stores prompts. Another one then sends each of them, and as many of the same length that nobody has sent, in
random order, and looks at the clock. `other` is the share of pairs in which the stored one was answered sooner: 0.5
where nothing can be told. `own`, the control, is the same for prompts that the second tenant stored itself. Prompts
whose sessions may be open and those that are on the disk alone are measured apart (`--live-sessions 0`).

Needs thaw[server]; the engine is the fake one. The receipt goes to OUT/gateway-timing.json.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from gateway_process import Client, repository, served, text

import thaw
from thaw import receipt as r
from thaw.bench.subject import model_of
from thaw.receipt.machine import software, this_machine

CHARACTERS = 600
ARMS = {
    "open": ("stored prompts whose sessions may be open", ()),
    "stored": ("stored prompts whose sessions are closed", ("--live-sessions", "0")),
}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("out", type=Path)
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--pairs", type=int, default=1000, help="of a round")
    told = words.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    keys = told.out / "keys.json"
    keys.touch(mode=0o600)
    keys.write_text(json.dumps([{"namespace": name, "keys": [f"key-{name}"]} for name in ("a", "b")]))
    arms = []
    with thaw.load_engine("fake") as engine:
        repository(told.out / "repository", engine, 1)
        for name, (title, options) in ARMS.items():
            with served(told.out / "repository", ["--engine", "fake"], "--keys", str(keys), *options) as gateway:
                owner, other = gateway.client("key-a"), gateway.client("key-b")
                rows = []
                for i in range(told.rounds):
                    print(f"{name}, round {i + 1} of {told.rounds}", flush=True)
                    rng = random.Random(f"{name} {i} {time.time()}")
                    auc = measured(rng, owner, other, told.pairs)
                    rows.append(r.Round(pair=i, values={"other": auc, "own": measured(rng, other, other, 100)}))
            what = "share of pairs in which a stored prompt was answered sooner than a new one"
            arms.append(r.Arm(name=name, title=title, text=what, rounds=tuple(rows)))
        made = sealed(told, arms, model_of(engine))
    (told.out / "gateway-timing.json").write_bytes(r.dumps(made))
    for one in made.derived:
        print(f"{one.name}: {one.value:.4f} ({one.low:.4f} to {one.high:.4f})")
    for goal in made.goals:
        print(f"{goal.name}: {'held' if goal.held else 'not held'}")


def sealed(told: argparse.Namespace, arms: Sequence[r.Arm], model: r.Model) -> r.Receipt:
    derived, goals = [], []
    for arm in arms:
        for whose in ("other", "own"):
            text = f"{arm.title}: {'another tenant' if whose == 'other' else 'the same tenant'}"
            derived.append(r.median(f"{arm.name}.{whose}", text, "", r.Term(arm=arm.name, value=whose)))
        goals += [
            r.at_most(f"{arm.name}.most", "at most 0.52", f"{arm.name}.other", 0.52),
            r.at_least(f"{arm.name}.least", "at least 0.48", f"{arm.name}.other", 0.48),
            r.at_least(f"{arm.name}.own", "the control: one's own can be told", f"{arm.name}.own", 0.6),
        ]
    return r.make(
        kind="gateway.timing",
        command="python benchmarks/gateway_timing.py OUT",
        versions=software("starlette", "uvicorn", "h11", "msgspec"),
        machine=this_machine(),
        model=model,
        parameters={"rounds": told.rounds, "pairs": told.pairs, "characters": CHARACTERS},
        arms=arms,
        derived=derived,
        goals=goals,
    )


def measured(rng: random.Random, owner: Client, asking: Client, num: int) -> float:
    """AUC of hits against misses: how often a prompt of `owner`'s was answered sooner than one of nobody's."""
    known = [text(rng, CHARACTERS) for _ in range(num)]
    owner.connect()
    for prompt in known:
        asked(owner, prompt)
    tries = [(True, prompt) for prompt in known] + [(False, text(rng, CHARACTERS)) for _ in known]
    rng.shuffle(tries)
    times: dict[bool, list[float]] = {True: [], False: []}
    asking.connect()
    for stored, prompt in tries:
        times[stored].append(asked(asking, prompt))
    misses = sorted(times[False])
    later = [len(misses) - (bisect_left(misses, hit) + bisect_right(misses, hit)) / 2 for hit in times[True]]
    return sum(later) / (num * num)


def asked(client: Client, prompt: str) -> float:
    begun = time.perf_counter()
    client.post("completions", {"prompt": prompt, "max_tokens": 1})
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
