"""What `thaw serve` adds: `python benchmarks/gateway.py added|ends|streams OUT`, with thaw[server] importable.

    added     the same new chat of about 1k tokens, straight to an engine in this process, in a session of thaw's that
              is committed, and through a gateway that has an engine of its own, in turn, over a repository with 10,000
              commits: all render, tokenise and prefill it
    ends      from a stream's last text to its last event, which comes when the commit is on disk; paired with a plain
              write of as many bytes as its KV has, fsync included
    streams   500 streams at once, in waves: every event once and in order, and the gateway's memory, which the later
              half of the waves must leave as it is; with --no-thread-caches the C library (glibc) keeps nothing of what
              it freed for each thread

A row of `added` and `ends` is a block of requests, with their percentiles. The engine is the fake one, whose step costs
little, unless `--engine NAME --model MODEL` name another one. The receipt goes to OUT/gateway-PART.json.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from itertools import starmap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import httpx
from gateway_process import Client, Served, percentile, repository, served, text

import thaw
from thaw import receipt as r
from thaw.bench.subject import accelerator, model_of, numerics
from thaw.core.cache import token_nbytes
from thaw.core.sampling import Sampling
from thaw.engines.base import Engine, GenerateRequest
from thaw.receipt.machine import software, this_machine

NUM_TOKENS = 16
NO_CACHES = " --no-thread-caches"
FLAT = 2048
"""Bytes of memory that a stream may leave behind."""
CHARACTERS = {"fake": 950}
"""Of a prompt of about 1k tokens; the fake engine's tokens are bytes."""


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("part", choices=sorted(PARTS))
    words.add_argument("out", type=Path)
    words.add_argument("--engine", default="fake")
    words.add_argument("--model")
    words.add_argument("--commits", type=int, default=10_000)
    words.add_argument("--blocks", type=int, default=5)
    words.add_argument("--requests", type=int, default=100, help="of a block")
    words.add_argument("--streams", type=int, default=500)
    words.add_argument("--no-thread-caches", action="store_true")
    told = words.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    if told.no_thread_caches:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.tcache_count=0"
    options = {"model": told.model} if told.model else {}
    with thaw.load_engine(told.engine, **options) as engine:
        folder = told.out / "repository"
        repository(folder, engine, told.commits if told.part == "added" else 1)
        named = ["--engine", told.engine, *(["--model", told.model] if told.model else [])]
        with served(folder, named) as gateway:
            made = PARTS[told.part](told, engine, gateway)
    out = told.out / f"gateway-{told.part}.json"
    out.write_bytes(r.dumps(made))
    for one in made.derived:
        print(f"{one.name}: {one.value:.6g} {one.unit} ({one.low:.6g} to {one.high:.6g})")
    for goal in made.goals:
        print(f"{goal.name}: {'held' if goal.held else 'not held'}")


def sealed(
    told: argparse.Namespace, engine: Engine, arms: Mapping[str, tuple[str, str, list[dict[str, float]]]], **more: Any
) -> r.Receipt:
    """`arms`: title, text and rows of each."""
    more_words = NO_CACHES * told.no_thread_caches
    return r.make(
        kind=f"gateway.{told.part}",
        command=f"python benchmarks/gateway.py {told.part} OUT --engine {told.engine}{more_words}",
        versions=software("starlette", "uvicorn", "h11", "msgspec", engine.info.name),
        machine=this_machine(accelerator(engine.info)),
        model=model_of(engine),
        parameters={
            "engine": told.engine, "commits": told.commits, "blocks": told.blocks, "requests": told.requests,
            "streams": told.streams, "tokens": NUM_TOKENS, "thread_caches": not told.no_thread_caches,
            **numerics(engine.info),
        },
        arms=[
            r.Arm(name=name, title=title, text=words, rounds=tuple(starmap(row, enumerate(rows))))
            for name, (title, words, rows) in arms.items()
        ],
        **more,
    )  # fmt: skip


def row(pair: int, values: dict[str, float]) -> r.Round:
    return r.Round(pair=pair, values=values)


def figure(arm: str, value: str, text: str, unit: str = "s") -> r.Derived:
    """The median of a value over an arm's rows."""
    return r.median(f"{arm}.{value}", text, unit, r.Term(arm=arm, value=value))


# -- added


def added(told: argparse.Namespace, engine: Engine, gateway: Served) -> r.Receipt:
    # An earlier run in OUT has stored what it said: what it said again would not be new.
    rng, client, rows = random.Random(), gateway.client(), []
    characters = CHARACTERS.get(told.engine, 4500)
    repo = thaw.open(told.out / "beside", engine=engine, create=True)
    direct(engine, text(rng, characters))
    committed(repo, text(rng, characters))
    through(client, text(rng, characters))
    for block in range(told.blocks):
        client.connect()
        gc.collect()
        gc.freeze()
        print(f"block {block + 1} of {told.blocks}", flush=True)
        taken: dict[str, list[float]] = {name: [] for name in ("direct", "session", "first", "whole")}
        for i in range(told.requests):
            prompt = text(rng, characters)
            turns: list[Callable[[], object]] = [
                lambda: taken["direct"].append(direct(engine, prompt)),  # noqa: B023 - called in this round
                lambda: taken["session"].append(committed(repo, prompt)),  # noqa: B023
                lambda: add(taken, through(client, prompt)),  # noqa: B023
            ]
            for turn in turns[:: 1 if i % 2 else -1]:
                turn()
                repo.store.upkeep.wait()  # of this process: beside the next turn it would slow the clock itself
        more = [whole - alone for whole, alone in zip(taken["whole"], taken["direct"], strict=True)]
        beside = [whole - alone for whole, alone in zip(taken["whole"], taken["session"], strict=True)]
        sooner = [first - alone for first, alone in zip(taken["first"], taken["direct"], strict=True)]
        rows.append(
            {
                "direct_p50_s": percentile(taken["direct"], 0.5), "gateway_p50_s": percentile(taken["whole"], 0.5),
                "added_p50_s": percentile(more, 0.5), "added_p99_s": percentile(more, 0.99),
                "before_commit_p50_s": percentile(sooner, 0.5), "before_commit_p99_s": percentile(sooner, 0.99),
                "session_p50_s": percentile(taken["session"], 0.5), "beside_p50_s": percentile(beside, 0.5),
                "beside_p99_s": percentile(beside, 0.99),
            }
        )  # fmt: skip
    derived = [
        figure("pair", "added_p50_s", "what the gateway adds to a request, its commit included: median of a block"),
        figure("pair", "added_p99_s", "the same, 99th percentile of a block"),
        figure("pair", "before_commit_p50_s", "what it adds until the last text is there, median of a block"),
        figure("pair", "before_commit_p99_s", "the same, 99th percentile of a block"),
        figure("pair", "beside_p50_s", "what it adds to a session that is committed, median of a block"),
        figure("pair", "beside_p99_s", "the same, 99th percentile of a block"),
    ]
    goals = [
        r.at_most("p50", "at most 5 ms, the commit aside", "pair.before_commit_p50_s", 0.005),
        r.at_most("p99", "at most 15 ms, the commit aside", "pair.before_commit_p99_s", 0.015),
    ]
    words = (
        "the same request, straight and through the gateway",
        "a chat that is new from its first word on; time to the last of its tokens, and to the reply's last byte",
        rows,
    )
    return sealed(told, engine, {"pair": words}, derived=derived, goals=goals)


def add(taken: dict[str, list[float]], times: tuple[float, float]) -> None:
    taken["first"].append(times[0])
    taken["whole"].append(times[1])


def direct(engine: Engine, prompt: str) -> float:
    """Seconds of rendering, tokenising, and generating in a new session of an engine in this process."""
    begun = time.perf_counter()
    rendered = engine.codec.chat_text([{"role": "user", "content": prompt}], add_generation_prompt=True)
    tokens = tuple(engine.codec.encode_chat(rendered))
    session = engine.open(seed=1)
    sampling = Sampling(max_tokens=NUM_TOKENS, ignore_eos=True)
    engine.generate([GenerateRequest(session=session, prompt=tokens, sampling=sampling)]).result()
    taken = time.perf_counter() - begun
    engine.close_session(session)
    return taken


def committed(repo: thaw.Repository, prompt: str) -> float:
    """Seconds of the same in a session that is committed."""
    begun = time.perf_counter()
    with repo.session(seed=1) as session:
        sampling = Sampling(max_tokens=NUM_TOKENS, ignore_eos=True)
        session.chat(history=[{"role": "user", "content": prompt}], sampling=sampling)
        session.commit("chat")
        return time.perf_counter() - begun


def through(client: Client, prompt: str) -> tuple[float, float]:
    """Seconds until the last text and until the end of a stream."""
    begun = last = end = time.perf_counter()
    body = {
        "messages": [{"role": "user", "content": prompt}], "max_tokens": NUM_TOKENS, "seed": 1, "ignore_eos": True
    }  # fmt: skip
    for at, told in client.events("chat/completions", body):
        end = at
        if told["choices"] and told["choices"][0]["delta"].get("content"):
            last = at
    return last - begun, end - begun


# -- ends


def ends(told: argparse.Namespace, engine: Engine, gateway: Served) -> r.Receipt:
    rng, client, rows = random.Random(), gateway.client(), []
    characters = CHARACTERS.get(told.engine, 4500)
    for block in range(told.blocks + 1):
        client.connect()
        taken: list[float] = []
        beyond: list[float] = []
        for _ in range(told.requests):
            seconds, tokens = last_to_end(client, text(rng, characters))
            taken.append(seconds)
            beyond.append(seconds - plain_write(told.out, bytes(tokens * token_nbytes(engine.info.groups))))
        if block:
            rows.append(
                {
                    "p50_s": percentile(taken, 0.5), "p99_s": percentile(taken, 0.99),
                    "beyond_p50_s": percentile(beyond, 0.5), "beyond_p99_s": percentile(beyond, 0.99),
                }
            )  # fmt: skip
    derived = [
        figure("ends", "p50_s", "last text to last event, median of a block"),
        figure("ends", "p99_s", "the same, 99th percentile of a block"),
        figure("ends", "beyond_p50_s", "the same, without a plain write of its KV, median of a block"),
        figure("ends", "beyond_p99_s", "the same, 99th percentile of a block"),
    ]
    goals = [r.at_most("p50", "at most 20 ms beyond a plain write of its KV", "ends.beyond_p50_s", 0.020)]
    words = (
        "from the last text to the last event",
        f"responses of {NUM_TOKENS} tokens to new prompts of about 1k: what the commit of their KV takes, too",
        rows,
    )
    return sealed(told, engine, {"ends": words}, derived=derived, goals=goals)


def last_to_end(client: Client, prompt: str) -> tuple[float, int]:
    """Seconds from the last text to the end, and the tokens that were stored."""
    last = end = 0.0
    one: dict[str, Any] = {}
    for at, one in client.events("responses", {"input": prompt, "max_output_tokens": NUM_TOKENS, "ignore_eos": True}):
        if one["type"] == "response.output_text.delta":
            last = at
        end = at
    return end - last, one["response"]["usage"]["total_tokens"]


def plain_write(folder: Path, data: bytes) -> float:
    """Seconds until new bytes are on disk: write, fsync, rename, fsync of the folder."""
    begun = time.perf_counter()
    path = folder / "plain"
    with path.with_suffix(".tmp").open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".tmp").rename(path)
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return time.perf_counter() - begun


# -- streams


def streams(told: argparse.Namespace, engine: Engine, gateway: Served) -> r.Receipt:
    rows: list[dict[str, float]] = []
    base = before = 0
    for wave in range(told.blocks + 2):
        begun = time.perf_counter()
        wrong, events = asyncio.run(all_streams(gateway.port, told.streams, wave))
        if wave == 1:
            base = gateway.rss_nbytes()
        if wave > 1:
            row = {"wrong": wrong, "events": events, "wave_s": time.perf_counter() - begun}
            now = gateway.rss_nbytes()
            rows.append({**row, "grown_nbytes": now - base, "step_nbytes": now - before})
        before = gateway.rss_nbytes()
    last = rows[-1]["grown_nbytes"]
    print(f"grown by {last / 2**20:.1f} MiB over {told.blocks} waves")
    derived = [
        figure("wave", "wrong", "streams with an event that is missing, doubled or out of order", unit=""),
        figure("wave", "grown_nbytes", "memory of the gateway beyond that after the second wave", unit="B"),
        figure("wave", "step_nbytes", "what one more wave added to it", unit="B"),
        figure("late", "step_nbytes", "the same, of the later half of the waves", unit="B"),
    ]
    goals = [
        r.at_most("wrong", "none", "wave.wrong", 0.0),
        r.at_most("grown", "at most 64 MiB", "wave.grown_nbytes", float(64 << 20)),
        r.at_most("flat", f"at most {FLAT} bytes a stream", "late.step_nbytes", float(FLAT * told.streams)),
    ]
    words = (
        f"{told.streams} streams at once",
        f"responses of {NUM_TOKENS} tokens, each checked event by event against its last one",
        rows,
    )
    late = ("the later half of the waves", "the same rows", rows[len(rows) // 2 :])
    return sealed(told, engine, {"wave": words, "late": late}, derived=derived, goals=goals)


async def all_streams(port: int, num: int, wave: int) -> tuple[int, int]:
    limits = httpx.Limits(max_connections=num, max_keepalive_connections=0)
    headers = {"authorization": "Bearer t"}
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", headers=headers, limits=limits, timeout=600, trust_env=False
    ) as client:
        done = await asyncio.gather(*(one_stream(client, f"wave {wave}, stream {i}") for i in range(num)))
    return sum(not right for right, _ in done), sum(events for _, events in done)


async def one_stream(client: httpx.AsyncClient, prompt: str) -> tuple[bool, int]:
    body = {"input": prompt, "max_output_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}
    heard, number, right, final = "", 0, True, None
    async with client.stream("POST", "/v1/responses", json=body) as reply:
        async for line in reply.aiter_lines():
            if not line.startswith("data: "):
                continue
            event = json.loads(line[6:])
            right = right and event["sequence_number"] == number
            number += 1
            heard += event["delta"] if event["type"] == "response.output_text.delta" else ""
            final = event.get("response", final)
    whole = final is not None and final["usage"] is not None and final["usage"]["output_tokens"] == NUM_TOKENS
    return right and whole and final["output"][0]["content"][0]["text"] == heard, number


PARTS: dict[str, Callable[[argparse.Namespace, Engine, Served], r.Receipt]] = {
    "added": added, "ends": ends, "streams": streams
}  # fmt: skip

if __name__ == "__main__":
    main()
