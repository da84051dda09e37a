"""A session goes from an engine on two cards to one on a single card, over to a second card, and back to both:
`python two_cards.py MODEL OUT`, with vLLM for CUDA and thaw importable, on a host with two GPUs.

First an engine on both cards reads the sessions and commits them. Then two engines run side by side, one a card: the
first hydrates what both cards wrote, goes on and commits what came of it, the second hydrates that. At last an engine
on both cards again hydrates all of it. Wherever a session is hydrated the same engine prefills it again as the other
arm.

The bytes of KV are compared in the engines' blocks themselves, KV head by KV head. In the negative control each card
reads the other's half of the heads. The receipt is rewritten whenever an engine has ended. With `--small` and a
small model the same runs wherever vLLM does, with `--ranks 1` also where there is one device (without the control).
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import msgspec
from arguments import parser
from in_worker import EXTENSION

from thaw import receipt as r
from thaw.bench import text
from thaw.bench.rounds import Rounds, arms_of
from thaw.bench.sample import Ask, Clock, Sample, children
from thaw.bench.subject import accelerator, model_of, numerics
from thaw.bench.vllm.arms import Document
from thaw.bench.vllm.hydrate import Stored, hydrate, live_child, prefill
from thaw.bench.vllm.options import SUFFIX_TOKENS
from thaw.bench.vllm.plain import Plain, beside
from thaw.core.ids import digest
from thaw.core.sampling import Sampling
from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.engines.served.client.engine import ServedEngine
from thaw.receipt.machine import software, this_machine
from thaw.repo import Repository, Session
from thaw.repo import open as open_repository

GIB = 1 << 30
ENGINE: dict[str, object] = {
    "gpu_memory_utilization": 0.45, "kv_cache_memory_bytes": 8 * GIB, "arena_nbytes": 8 * GIB, "block_size": 16,
    "max_model_len": 20000,
}  # fmt: skip
SMALL: dict[str, object] = {"enforce_eager": True, "max_model_len": 1024}
WORDS = {
    "live": ("{0} tokens, two cards, the engine that read them", "a child of the live session"),
    "one.hydrate": ("{0} tokens, one card, hydrated", "read the commit of two cards, load it, fork, go on"),
    "one.prefill": ("{0} tokens, one card, prefilled again", "the same engine, a plain request, nothing cached"),
    "one.live": ("{0} tokens and a turn, one card, live", "a child of the session that went on there"),
    "over.hydrate": (
        "{0} tokens and a turn, the other card, hydrated",
        "an engine that has that card alone reads what the first card's engine committed, loads it, forks, goes on",
    ),
    "over.prefill": ("{0} tokens and a turn, the other card, prefilled again", "the same engine, a plain request"),
    "over.move": (
        "{0} tokens, from a live session on one card to a child on the other",
        "from the call of commit, of a session that was never captured, through the store's packs to the first token",
    ),
    "two.hydrate": ("{0} tokens, two cards again, hydrated", "read the commit of two cards in a new process, load it"),
    "two.prefill": ("{0} tokens, two cards again, prefilled again", "the same engine, a plain request, nothing cached"),
    "back.hydrate": ("{0} tokens and a turn, two cards, hydrated", "what one card computed and committed, loaded"),
    "exchanged": (
        "{0} tokens, two cards, each with the other's half of the KV heads",
        "the negative control: every blob passes its hash, and lies on the wrong card",
    ),
    "bytes.live": ("{0} tokens, bytes of KV on two cards", "what a capture takes from the blocks, KV head by KV head"),
    "bytes.one": ("{0} tokens, bytes of KV on one card", "the blocks, read back behind the load"),
    "bytes.over": ("{0} tokens, bytes of KV on the other card", "the blocks, read back behind the load"),
    "bytes.two": ("{0} tokens, bytes of KV on two cards again", "the blocks, read back behind the load"),
    "close.one": ("{0} tokens, one card against two", "log probabilities of the likeliest tokens after hydrating"),
    "close.back": ("{0} tokens and a turn, two cards against one", "the same, on the way back"),
    "close.exchanged": ("{0} tokens, the control against the live session", "the same with exchanged halves"),
}
NOTES = (
    "Arms that are compared take turns in one run, in an order that is shuffled and then reversed, each ran once before"
    " without a record; ratios are of arms in one round.",
    "Each engine was booted after the one before had ended, the two of one card each side by side. Each child is asked"
    " a suffix and generates greedily; the first token's time is from the start of the hydrate or plain request.",
    "Rows of matrix products are summed over the cards in another order than on one, so log probabilities after a"
    " journey through one card are close and not equal: the largest difference between the 20 likeliest first tokens is"
    " the arms' whose names begin with close.",
    "Bytes are compared as digests of the KV of each head, in the order of the heads, over all tokens that have KV.",
)
MIN_GAIN = 6.0
TOLERANCE = 0.25
"""Of log probabilities between rank counts, as in the law book (`CrossingTests`)."""
TOP = 20


@dataclass
class Booted:
    """An engine, the run's repository as it sees it, and plain requests to it. `ranks`: cards that it runs on."""

    engine: ServedEngine
    repo: Repository
    plain: Plain
    ranks: int


class Journey:
    """The run. `commits`: by length, what two cards wrote and what one card made of it, with their KV's tokens.
    `tops`: log probabilities of the likeliest first tokens, by arm."""

    def __init__(self, model: str, out: Path, small: bool, ranks: int) -> None:
        self.small, self.ranks = small, ranks
        self.options = {"model": model, "worker_extension_cls": EXTENSION, **(SMALL if small else ENGINE)}
        self.lengths, self.num_rounds, self.max_tokens = ((300,), 2, 4) if small else ((4000, 16000), 6, 32)
        self.target = out / "bench-two-cards.json"
        self.rounds = Rounds(self._say, 0.0 if small else 0.2)
        self.commits: dict[int, list[Stored]] = {n: [] for n in self.lengths}
        self.tops: dict[str, dict[int, float]] = {}
        self.document: Document | None = None
        self.began = time.monotonic()
        self.about: dict[str, object] = {}
        self._moved = 0

    def run(self) -> r.Receipt:
        with tempfile.TemporaryDirectory(prefix="thaw-bench-", dir=self.target.parent) as folder:
            repo = Path(folder) / "repo"
            with self._engine(repo, self.ranks) as two:
                for length in self.lengths:
                    self._read(two, length)
            self._write()
            with self._engine(repo, 1, card=0) as one, self._engine(repo, 1, card=1) as other:
                for length in self.lengths:
                    self._on_one(one, length)
                    self._over(one, other, length)
                    self._write()
            with self._engine(repo, self.ranks) as two:
                for length in self.lengths:
                    self._again(two, length)
                self._write()
                for length in self.lengths if self.ranks > 1 else ():
                    self._exchanged(two, length)
            self._write()
        return self.seal()

    # -- the legs of the journey

    def _read(self, on: Booted, length: int) -> None:
        with on.repo.session(seed=7) as live:
            with self._watched(on):
                live.append(token_ids=self._tokens.session(length))
                self._keep(live, length, "read on two cards")
                self._note("bytes.live", length, bytes=_seen(on, live.num_kv))
            self.tops[f"live.{length}"] = self._top(live)
            self.rounds.alternate(self.num_rounds, {f"live.{length}": partial(live_child, live, self._ask)})

    def _on_one(self, on: Booted, length: int) -> None:
        self._look("one", on, length)
        self._pair("one", on, length, self.commits[length][0])
        with on.repo.session(self.commits[length][0].commit) as session:
            session.append(token_ids=self._tokens.suffixes(8)[7] * 16)
            self._keep(session, length, "gone on on one card")
            self.tops[f"one.live.{length}"] = self._top(session)
            self.rounds.alternate(self.num_rounds, {f"one.live.{length}": partial(live_child, session, self._ask)})

    def _over(self, one: Booted, other: Booted, length: int) -> None:
        self._look("over", other, length)
        self._pair("over", other, length, self.commits[length][1], move=partial(self._move, one, other, length))

    def _again(self, on: Booted, length: int) -> None:
        self._look("two", on, length)
        self._pair("two", on, length, self.commits[length][0])
        stored = self.commits[length][1]
        with on.repo.session(stored.commit) as session:
            self._differ("close.back", length, self._top(session), f"one.live.{length}")
        self.rounds.alternate(self.num_rounds, {f"back.hydrate.{length}": partial(hydrate, on.repo, stored, self._ask)})

    def _exchanged(self, on: Booted, length: int) -> None:
        stored = self.commits[length][0]
        on.engine.collective_rpc("thaw_exchange", (True,))
        try:
            with self._watched(on), on.repo.session(stored.commit) as session:
                sample = children(session, self._ask, Clock(), num_wanted=stored.num_kv)
                self._note("exchanged", length, **sample.outputs, bytes=_seen(on, stored.num_kv))
                self._differ("close.exchanged", length, self._top(session), f"live.{length}")
        finally:
            on.engine.collective_rpc("thaw_exchange", (False,))

    def _look(self, where: str, on: Booted, length: int) -> None:
        """The first time that the engine sees what two cards wrote: the bytes, and how close the numbers are."""
        stored = self.commits[length][0]
        with self._watched(on), on.repo.session(stored.commit) as session:
            top = self._top(session)
            self._note(f"bytes.{where}", length, bytes=_seen(on, stored.num_kv))
        if on.ranks != self.ranks and where == "one":
            self._differ("close.one", length, top, f"live.{length}")

    def _keep(self, session: Session, length: int, message: str) -> None:
        began = time.monotonic()
        commit = session.commit(message, branch=f"trunk-{length}-{len(self.commits[length])}").commit
        self._say(f"{message}, {length} tokens: committed in {time.monotonic() - began:.3f} s")
        self.commits[length].append(Stored(session.tokens, commit, session.num_kv))

    def _pair(self, where: str, on: Booted, length: int, stored: Stored, **more: partial[Sample]) -> None:
        arms = {
            f"{where}.hydrate.{length}": partial(hydrate, on.repo, stored, self._ask),
            f"{where}.prefill.{length}": partial(prefill, on.plain, stored, self._ask),
            **{f"{where}.{name}.{length}": thunk for name, thunk in more.items()},
        }
        self.rounds.alternate(self.num_rounds, arms)

    def _move(self, one: Booted, other: Booted, length: int) -> Sample:
        """A point that only lives on one card, through the store, to its first token on the other."""
        self._moved += 1
        with one.repo.session(seed=7) as live:
            live.append(token_ids=self._tokens.session(length, 1 + self._moved % (self.num_rounds + 1)))
            clock = Clock()
            commit = live.commit("a point that goes over", branch=f"over-{length}-{self._moved}").commit
            clock.lap("commit")
            with other.repo.session(commit) as session:
                clock.lap("hydrate")
                return children(session, self._ask, clock, num_wanted=live.num_kv)

    # -- what is noted beside the rounds

    def _note(self, arm: str, length: int, **outputs: str) -> None:
        sample = Sample(values={"num_tokens": float(length)}, outputs=outputs)
        self.rounds.measured[f"{arm}.{length}"].append((0, sample))

    def _differ(self, arm: str, length: int, top: dict[int, float], reference: str) -> None:
        own = self.tops[reference]
        shared = own.keys() & top.keys()
        largest = max((abs(own[token] - top[token]) for token in shared), default=100.0)
        sample = Sample(values={"difference": largest, "shared": float(len(shared))})
        self.rounds.measured[f"{arm}.{length}"].append((0, sample))

    def _top(self, session: Session) -> dict[int, float]:
        """Of the first token that a child of the session would say."""
        with session.fork(1) as kids:
            sampling = Sampling(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=TOP)
            told = kids.stream(token_ids=self._ask.suffixes[:1], sampling=sampling).result()[0].top_logprobs
        assert told is not None
        return dict(told[0])

    @contextmanager
    def _watched(self, on: Booted) -> Iterator[None]:
        on.engine.collective_rpc("thaw_watch", (True,))
        try:
            yield
        finally:
            on.engine.collective_rpc("thaw_watch", (False,))

    @property
    def _ask(self) -> Ask:
        return Ask(n=1, suffixes=self._tokens.suffixes(1), max_tokens=self.max_tokens, temperature=0.0)

    @property
    def _tokens(self) -> Document:
        assert self.document is not None
        return self.document

    @contextmanager
    def _engine(self, folder: Path, ranks: int, card: int | None = None) -> Iterator[Booted]:
        self._say(f"booting on {ranks} of the cards" if card is None else f"booting on card {card}")
        with _only_card(card if self.ranks > 1 else None):
            engine = load_engine("vllm", **{**self.options, "tensor_parallel_size": ranks})
        with engine, open_repository(folder, engine=engine, create=True) as repo:
            self._say("booted")
            self._tell(engine)
            yield Booted(cast(ServedEngine, engine), repo, beside(engine), ranks)
        gc.collect()

    def _tell(self, engine: Engine) -> None:
        if self.document is None:
            need = max(self.lengths) * (self.num_rounds + 3) + SUFFIX_TOKENS * 8
            self.document = Document(engine.codec.encode(text.document(need // 8 + 1), first=True))
            self.about = {"model": model_of(engine), "info": engine.info}

    def _say(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {line}", flush=True)

    # -- the receipt

    def _write(self) -> None:
        fresh = self.target.with_suffix(".new")
        fresh.write_bytes(r.dumps(self.seal()))
        fresh.replace(self.target)

    def seal(self) -> r.Receipt:
        measured, info = self.rounds.measured, self.about["info"]
        numbers = self._numbers()
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
            arms=arms_of(measured, list(measured).index, _words), derived=numbers, checks=self._checks(),
            goals=self._goals(numbers), notes=NOTES,
        )  # fmt: skip

    def _numbers(self) -> list[r.Derived]:
        measured, out = self.rounds.measured, []
        for name in measured:
            title = _words(name)[0]
            if name.startswith("close."):
                said = f"{title}: largest difference of a log probability"
                out.append(r.median(f"{name}.difference", said, "", _value(name, "difference")))
            elif not name.startswith(("bytes.", "exchanged.")):
                out.append(r.median(f"{name}.first", f"{title}: first token", "s", _value(name, "first_token_s")))
        for length in self.lengths:
            for where, card in (("one", "on one card"), ("over", "on the other card"), ("two", "on two cards")):
                over = f"{where}.prefill.{length}"
                for arm, done in (("hydrate", "hydrating them"), ("move", "moving a live session's")):
                    under = f"{where}.{arm}.{length}"
                    if {over, under} <= set(measured):
                        words = f"prefilling {length} tokens again {card} takes × {done}, to the first token"
                        whose = "gain" if arm == "hydrate" else f"gain.{arm}"
                        terms = _value(over, "first_token_s"), _value(under, "first_token_s")
                        out.append(r.ratio(f"{whose}.{where}.{length}", words, *terms))
        return out

    def _checks(self) -> list[r.Check]:
        measured, out = self.rounds.measured, []
        for name in measured:
            if name.startswith(("live.", "one.live.")) or ".hydrate." in name or ".move." in name:
                out.append(r.all_hit(f"hit.{name}", f"{_words(name)[0]}: nothing prefilled again", name))
        for length in self.lengths:
            for arm, reference, outputs, promised in (
                ("two.hydrate", "live", ("tokens", "logprobs"), True),
                ("over.hydrate", "one.live", ("tokens", "logprobs"), True),
                ("back.hydrate", "one.live", ("tokens", "logprobs"), False),
                ("bytes.one", "bytes.live", ("bytes",), True),
                ("bytes.over", "bytes.live", ("bytes",), True),
                ("bytes.two", "bytes.live", ("bytes",), True),
                ("exchanged", "live", ("tokens", "logprobs"), False),
                ("exchanged", "bytes.live", ("bytes",), False),
            ):
                names = f"{arm}.{length}", f"{reference}.{length}"
                if set(names) <= set(measured):
                    for output in outputs:
                        words = f"{_words(names[0])[0]}: {output} equal those of {_words(names[1])[0]}, bit for bit"
                        out.append(
                            r.equal_outputs(f"same-{output}.{names[0]}", words, *names, output, promised=promised)
                        )
        return out

    def _goals(self, numbers: list[r.Derived]) -> list[r.Goal]:
        out = []
        for name in (number.name for number in numbers):
            if name.startswith("gain.") and name.endswith(".16000") and not name.startswith("gain.move"):
                words = f"hydrating 16000 tokens is {MIN_GAIN:g} × sooner than prefilling again"
                out.append(r.at_least(name, words, name, MIN_GAIN))
            if name.startswith("close.exchanged."):
                words = "the control differs by more than the tolerance"
                out.append(r.at_least(name, words, name, TOLERANCE))
            elif name.startswith("close."):
                words = f"log probabilities of other rank counts differ by {TOLERANCE} at most"
                out.append(r.at_most(name, words, name, TOLERANCE))
        return out


@contextmanager
def _only_card(card: int | None) -> Iterator[None]:
    """Processes that are started inside see that card alone. None: all."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    if card is not None:
        os.environ[name] = before.split(",")[card] if before else str(card)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _seen(on: Booted, num_kv: int) -> str:
    """Of the engine's KV, head by head over the ranks in their order."""
    ranks = on.engine.collective_rpc("thaw_seen", (num_kv,))
    return digest("".join(head for heads in ranks for head in heads).encode())


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
