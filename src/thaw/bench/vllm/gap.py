"""What others feel: the largest gap between tokens of requests that are decoding while a long session is captured, is
hydrated, or is admitted by vLLM from its own prefix cache.

The others are plain requests, and go on for at least `gap_steps` tokens after the event began, so a round's arms look
at as many tokens each. `step_s` is the median of all gaps, `largest_gap_at_s` is when the largest began, counted from
the event's beginning.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from thaw.bench.rounds import Rounds, Thunk
from thaw.bench.sample import Ask, Clock, Sample, children
from thaw.bench.vllm.arms import Document, fresh_salt, plain_children, read_trunk
from thaw.bench.vllm.options import Options
from thaw.core.sampling import Sampling
from thaw.repo import Repository, Session

if TYPE_CHECKING:
    from thaw.bench.vllm.plain import Decoding, Plain

BEFORE = 4
"""Tokens that each of the others has when the event begins."""


def measure(rounds: Rounds, options: Options, repo: Repository, plain: Plain, document: Document) -> None:
    Gaps(options, repo, plain, document).measure(rounds)


class Gaps:
    def __init__(self, options: Options, repo: Repository, plain: Plain, document: Document) -> None:
        self._options, self._repo, self._plain, self._document = options, repo, plain, document
        self._ask = Ask(n=1, suffixes=document.suffixes(1), max_tokens=1, temperature=0.0)
        self._number, self._salt = 0, fresh_salt()

    def measure(self, rounds: Rounds) -> None:
        options, trunk = self._options, self._document.session(self._options.gap_tokens)
        rounds.progress(f"reading {options.gap_tokens} tokens")
        with self._repo.session(seed=options.seed) as live:
            live.append(token_ids=trunk)
            commit = live.commit("a session that is hydrated while others decode", branch="gap").commit
        arms: dict[str, Thunk] = {
            "gap.none": partial(self.beside, lambda: None),
            "gap.admit": partial(self.admit, trunk),
            "gap.capture": self._capture,
            "gap.hydrate": partial(self.beside, partial(self.hydrate, commit)),
        }
        rounds.alternate(options.gap_rounds, arms)

    def admit(self, trunk: tuple[int, ...]) -> Sample:
        """Of a trunk that vLLM has read just before, for the other arms take its blocks."""
        whole_blocks = len(trunk) // self._options.block_size * self._options.block_size
        read_trunk(self._plain, trunk, self._salt)
        return self.beside(partial(plain_children, self._plain, trunk, self._salt, self._ask, num_wanted=whole_blocks))

    def hydrate(self, commit: str) -> Sample:
        clock = Clock()
        with self._repo.session(commit) as session:
            clock.lap("hydrate")
            return children(session, self._ask, clock, num_wanted=session.num_kv)

    def _capture(self) -> Sample:
        """Of a session that decodes as well, and was never captured: all of its KV leaves the device, into a pack."""
        self._number += 1
        options = self._options
        sampling = Sampling(temperature=0.0, max_tokens=options.gap_most, ignore_eos=True)
        trunk = self._document.session(options.gap_tokens, self._number)
        with self._repo.session(seed=options.seed) as live, live.stream(token_ids=trunk, sampling=sampling) as stream:
            next(delta for delta in stream if delta.token_ids)
            branch = f"gap-{self._number}"
            sample = self.beside(partial(self._commit, live, branch))
            stream.cancel()
            stream.result()
        return sample

    def beside(self, event: Callable[[], Sample | None]) -> Sample:
        """The event, while the others decode, and what it found in the cache."""
        options = self._options
        with self._others() as others:
            others.wait_for(BEFORE)
            began = time.monotonic()
            happened = event()
            ended = time.monotonic()
            others.wait_for(options.gap_steps, since=began)
            until = max(ended, others.reached(options.gap_steps, since=began))
            inside = float(not others.any_over())
        found = gaps(others.arrivals, began, until)
        largest, at = max(found)
        step = statistics.median(length for length, _ in found)
        values = {"largest_gap_s": largest, "step_s": step, "with_a_step_s": largest + step, "inside": inside}
        values |= {"largest_gap_at_s": at - began, "event_s": ended - began}
        if happened is None:
            return Sample(values=values)
        return Sample(values=values, stages_s=happened.stages_s, hits=happened.hits)

    @staticmethod
    def _commit(live: Session, branch: str) -> None:
        live.commit("captured while others decode", branch=branch)

    @contextmanager
    def _others(self) -> Iterator[Decoding]:
        from thaw.bench.vllm.plain import Decoding, PlainRequest

        options, salt = self._options, fresh_salt()
        requests = [
            PlainRequest(tokens=self._document.session(options.gap_prompt, i), max_tokens=options.gap_most, salt=salt)
            for i in range(options.gap_others)
        ]
        others = Decoding(self._plain, requests)
        try:
            yield others
        finally:
            others.stop()


def gaps(arrivals: Sequence[Sequence[float]], began: float, until: float) -> list[tuple[float, float]]:
    """Seconds between one token of a request and its next, where the first came before `until` and the next after
    `began`, and when that was."""
    return [
        (later - earlier, earlier)
        for times in arrivals
        for earlier, later in itertools.pairwise(times)
        if later > began and earlier < until
    ]
