"""A session goes from an engine on two cards to one on a single card and back: `python two_cards.py MODEL OUT`, with
vLLM for CUDA and thaw importable, on a host with two GPUs.

Three engines run one after the other. The first, on both cards, reads the sessions, commits them and is measured; the
second, on one card, hydrates them, goes on and commits what came of it; the third, on both cards again, hydrates both.
Wherever a session is hydrated the same engine prefills it again as the other arm. With `--small` and a small model the
same runs wherever vLLM does, with `--ranks 1` also where there is one device.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec
from arguments import parser

from thaw import receipt as r
from thaw.bench import text
from thaw.bench.rounds import Rounds, arms_of
from thaw.bench.sample import Ask
from thaw.bench.subject import accelerator, model_of, numerics
from thaw.bench.vllm.arms import Document
from thaw.bench.vllm.hydrate import Stored, hydrate, live_child, prefill
from thaw.bench.vllm.options import SUFFIX_TOKENS
from thaw.bench.vllm.plain import Plain, beside
from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.receipt.machine import software, this_machine
from thaw.repo import Repository, Session
from thaw.repo import open as open_repository

GIB = 1 << 30
ENGINE: dict[str, object] = {
    "gpu_memory_utilization": 0.85, "kv_cache_memory_bytes": 8 * GIB, "arena_nbytes": 8 * GIB, "block_size": 16,
    "max_model_len": 20000,
}  # fmt: skip
SMALL: dict[str, object] = {"enforce_eager": True, "max_model_len": 1024}
WORDS = {
    "live": ("{0} tokens, two cards, the engine that read them", "a child of the live session"),
    "one.hydrate": ("{0} tokens, one card, hydrated", "read the commit of two cards, load it, fork, go on"),
    "one.prefill": ("{0} tokens, one card, prefilled again", "the same engine, a plain request, nothing cached"),
    "one.live": ("{0} tokens and a turn, one card, live", "a child of the session that went on there"),
    "two.hydrate": ("{0} tokens, two cards again, hydrated", "read the commit of two cards in a new process, load it"),
    "two.prefill": ("{0} tokens, two cards again, prefilled again", "the same engine, a plain request, nothing cached"),
    "back.hydrate": ("{0} tokens and a turn, two cards, hydrated", "what one card computed and committed, loaded"),
}
NOTES = (
    "Arms that are compared take turns in one run, in an order that is shuffled and then reversed, each ran once before"
    " without a record; ratios are of arms in one round.",
    "Each engine was booted after the one before had ended. Each child is asked a suffix and generates greedily; the"
    " first token's time is from the start of the hydrate, or of the plain request.",
    "Rows of matrix products are summed over the cards in another order than on one, so log probabilities after a"
    " journey through one card are close and not equal; bytes of KV are compared in the law book.",
)
MIN_GAIN = 6.0


class Journey:
    """The run. `commits`: by length, what two cards wrote and what one card made of it, with their KV's tokens."""

    def __init__(self, model: str, out: Path, small: bool, ranks: int) -> None:
        self.small, self.ranks = small, ranks
        self.options = {"model": model, **(SMALL if small else ENGINE)}
        self.lengths, self.num_rounds, self.max_tokens = ((300,), 2, 4) if small else ((4000, 16000), 6, 32)
        self.target = out / "bench-two-cards.json"
        self.rounds = Rounds(self._say, 0.0 if small else 0.2)
        self.commits: dict[int, list[Stored]] = {n: [] for n in self.lengths}
        self.document: Document | None = None
        self.began = time.monotonic()
        self.about: dict[str, object] = {}

    def run(self) -> r.Receipt:
        with tempfile.TemporaryDirectory(prefix="thaw-bench-", dir=self.target.parent) as folder:
            for measure, ranks in ((self._read, self.ranks), (self._on_one, 1), (self._again, self.ranks)):
                with self._engine(Path(folder) / "repo", ranks) as (repo, plain):
                    for length in self.lengths:
                        measure(repo, plain, length)
                self.target.write_bytes(r.dumps(self.seal()))
        return self.seal()

    def _read(self, repo: Repository, _plain: Plain, length: int) -> None:
        with repo.session(seed=7) as live:
            live.append(token_ids=self._tokens.session(length))
            self._keep(live, length, "read on two cards")
            self.rounds.alternate(self.num_rounds, {f"live.{length}": partial(live_child, live, self._ask)})

    def _on_one(self, repo: Repository, plain: Plain, length: int) -> None:
        self._pair("one", repo, plain, length)
        with repo.session(self.commits[length][0].commit) as session:
            session.append(token_ids=self._tokens.suffixes(8)[7] * 16)
            self._keep(session, length, "gone on on one card")
            self.rounds.alternate(self.num_rounds, {f"one.live.{length}": partial(live_child, session, self._ask)})

    def _again(self, repo: Repository, plain: Plain, length: int) -> None:
        self._pair("two", repo, plain, length)
        back = partial(hydrate, repo, self.commits[length][1], self._ask)
        self.rounds.alternate(self.num_rounds, {f"back.hydrate.{length}": back})

    def _keep(self, session: Session, length: int, message: str) -> None:
        began = time.monotonic()
        commit = session.commit(message, branch=f"trunk-{length}-{len(self.commits[length])}").commit
        self._say(f"{message}, {length} tokens: committed in {time.monotonic() - began:.3f} s")
        self.commits[length].append(Stored(session.tokens, commit, session.num_kv))

    def _pair(self, where: str, repo: Repository, plain: Plain, length: int) -> None:
        stored = self.commits[length][0]
        arms = {
            f"{where}.hydrate.{length}": partial(hydrate, repo, stored, self._ask),
            f"{where}.prefill.{length}": partial(prefill, plain, stored, self._ask),
        }
        self.rounds.alternate(self.num_rounds, arms)

    @property
    def _ask(self) -> Ask:
        return Ask(n=1, suffixes=self._tokens.suffixes(1), max_tokens=self.max_tokens, temperature=0.0)

    @property
    def _tokens(self) -> Document:
        assert self.document is not None
        return self.document

    @contextmanager
    def _engine(self, folder: Path, ranks: int) -> Iterator[tuple[Repository, Plain]]:
        self._say(f"booting on {ranks} of the cards")
        with (
            load_engine("vllm", **{**self.options, "tensor_parallel_size": ranks}) as engine,
            open_repository(folder, engine=engine, create=True) as repo,
        ):
            self._say("booted")
            self._tell(engine)
            yield repo, beside(engine)
        gc.collect()

    def _tell(self, engine: Engine) -> None:
        if self.document is None:
            need = max(self.lengths) + SUFFIX_TOKENS * 8
            self.document = Document(engine.codec.encode(text.document(need // 8 + 1), first=True))
            self.about = {"model": model_of(engine), "info": engine.info}

    def _say(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {line}", flush=True)

    def seal(self) -> r.Receipt:
        measured, info = self.rounds.measured, self.about["info"]
        numbers, checks = [], []
        for name in measured:
            kind, _, length = name.rpartition(".")
            title = WORDS[kind][0].format(length)
            numbers.append(r.median(f"{name}.first", f"{title}: first token", "s", _value(name, "first_token_s")))
            if "prefill" not in name:
                checks.append(r.all_hit(f"hit.{name}", f"{title}: nothing prefilled again", name))
        for length in self.lengths:
            for where, card in (("one", "on one card"), ("two", "on two cards")):
                over, under = f"{where}.prefill.{length}", f"{where}.hydrate.{length}"
                if {over, under} <= set(measured):
                    words = f"prefilling {length} tokens again {card} takes × hydrating them, to the first token"
                    first = [_value(arm, "first_token_s") for arm in (over, under)]
                    numbers.append(r.ratio(f"gain.{where}.{length}", words, *first))
            for arm, reference, promised in (("two.hydrate", "live", True), ("back.hydrate", "one.live", False)):
                if f"{arm}.{length}" in measured:
                    for output in ("tokens", "logprobs"):
                        words = f"{WORDS[arm][0].format(length)}: {output} equal those before, bit for bit"
                        names = f"same-{output}.{arm}.{length}", words, f"{arm}.{length}", f"{reference}.{length}"
                        checks.append(r.equal_outputs(*names, output, promised=promised))
        words = f"hydrating 16000 tokens is {MIN_GAIN:g} × sooner than prefilling again"
        goals = [
            r.at_least(n.name, words, n.name, MIN_GAIN)
            for n in numbers
            if n.name.startswith("gain.") and n.name.endswith(".16000")
        ]  # fmt: skip
        return r.make(
            kind="bench.two-cards", command="python benchmarks/gpu/two_cards.py MODEL OUT",
            versions={
                **software("vllm", "torch", "triton", "transformers", "msgspec", "blake3"),
                "engine": f"{info.name} {info.version}",
            },
            machine=this_machine(accelerator(info)), model=self.about["model"],
            parameters={
                "ranks": self.ranks, "lengths": ",".join(map(str, self.lengths)), "rounds": self.num_rounds,
                "child_tokens": self.max_tokens, "suffix_tokens": SUFFIX_TOKENS, "seed": 7,
                **{f"engine.{n}": v for n, v in self.options.items() if n != "model"}, **numerics(info),
            },
            arms=arms_of(measured, list(measured).index, _words), derived=numbers, checks=checks, goals=goals,
            notes=NOTES,
        )  # fmt: skip


def _value(arm: str, value: str) -> r.Term:
    return r.Term(arm=arm, value=value)


def _words(name: str) -> tuple[str, str]:
    kind, _, length = name.rpartition(".")
    title, text_ = WORDS[kind]
    return title.format(length), text_


def main() -> None:
    words = parser(__doc__, parts=False)
    words.add_argument("--ranks", type=int, default=2)
    told = words.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    receipt = Journey(told.model, told.out, told.small, told.ranks).run()
    for line in (*receipt.derived, *receipt.checks, *receipt.goals):
        print(json.dumps(msgspec.to_builtins(line)), flush=True)


if __name__ == "__main__":
    main()
