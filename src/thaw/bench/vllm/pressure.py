"""More sessions than the engine's blocks hold, and returns to each: vLLM's prefix cache (LRU), against parked sessions.

An arm reads all its sessions, each with one visit right after it was read (`…first`), then returns to all of them in an
order that is reshuffled each time, the same in both arms. The arms run one after the other, each with the pool to
itself. `recomputed` is what the engine prefilled of tokens that were prefilled before.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import msgspec

from thaw.bench.rounds import Rounds
from thaw.bench.sample import Ask, Clock, Sample, children
from thaw.bench.vllm.arms import Document, fresh_salt, plain_children, read_trunk
from thaw.bench.vllm.options import Options
from thaw.repo import Repository

if TYPE_CHECKING:
    from thaw.bench.vllm.plain import Plain

Visit = Callable[[], Sample]
Make = Callable[[ExitStack, int], Visit]
"""Read tree number i; what visits it. What has to be released goes on the stack."""


def measure(rounds: Rounds, options: Options, repo: Repository, plain: Plain, document: Document) -> None:
    ask = _ask(options, document)

    def thaw(stack: ExitStack, number: int) -> Visit:
        session = stack.enter_context(repo.session(seed=options.seed))
        session.append(token_ids=document.session(options.tree_tokens, number))
        session.park()
        return lambda: children(session, ask, Clock(), num_wanted=session.num_kv)

    _measure(rounds, options, {"thaw": thaw, "native": _plain(options, plain, document)})


def measure_offload(rounds: Rounds, options: Options, plain: Plain, document: Document) -> None:
    """The arm of an engine with vLLM's offload tier, where the same requests find in host memory what the LRU lost."""
    _measure(rounds, options, {"offload": _plain(options, plain, document)})


def _plain(options: Options, plain: Plain, document: Document) -> Make:
    ask = _ask(options, document)

    def make(_: ExitStack, number: int) -> Visit:
        trunk, salt = document.session(options.tree_tokens, number), fresh_salt()
        read_trunk(plain, trunk, salt)
        return lambda: plain_children(plain, trunk, salt, ask, num_wanted=len(trunk))

    return make


def _ask(options: Options, document: Document) -> Ask:
    return Ask(
        n=options.branches, suffixes=document.suffixes(options.branches), max_tokens=options.branch_tokens,
        temperature=0.0,
    )  # fmt: skip


def _measure(rounds: Rounds, options: Options, makes: dict[str, Make]) -> None:
    rounds.progress("warming up")
    for make in makes.values():
        with ExitStack() as stack:
            make(stack, 0)()
    for number in range(options.pressure_rounds):
        for name in sorted(makes, reverse=bool(number % 2)):
            with ExitStack() as stack:
                _Pass(rounds, options, name, number).run(makes[name], stack)


class _Pass:
    """One arm's pass through all trees, as round `number`."""

    def __init__(self, rounds: Rounds, options: Options, name: str, number: int) -> None:
        self._rounds, self._options, self._name, self._number = rounds, options, name, number
        self._dice = random.Random(number)

    def run(self, make: Make, stack: ExitStack) -> None:
        visits = []
        for tree in range(self._options.trees):
            self._say(f"reading session {tree + 1} of {self._options.trees}")
            visits.append(make(stack, tree))
            self._take(f"{self._name}.first", 0, tree, visits[tree])
        for number in range(self._options.returns):
            self._say(f"return {number + 1} of {self._options.returns} to every session")
            for tree in self._dice.sample(range(self._options.trees), self._options.trees):
                self._take(self._name, number, tree, visits[tree])

    def _take(self, arm: str, visit: int, tree: int, measure: Visit) -> None:
        options = self._options
        pair = (self._number * options.returns + visit) * options.trees + tree
        self._rounds.measured[f"pressure.{arm}"].append((pair, with_recomputed(measure())))

    def _say(self, what: str) -> None:
        self._rounds.progress(f"pressure, {self._name}, round {self._number + 1}: {what}")


def with_recomputed(sample: Sample) -> Sample:
    """Tokens that were wanted from the cache and were not there."""
    assert sample.hits is not None
    missing = max(sample.hits.num_wanted_tokens - sample.hits.num_cached_tokens, 0)
    return msgspec.structs.replace(sample, values={**sample.values, "recomputed": float(missing)})
