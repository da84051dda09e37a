"""The next token of one request by thaw's rules, inside a server's sampler.

A pure function of the logits, the request's parameters, its seed, the position and the tokens so far.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch

from thaw.engines.sampling.torch_sampler import Past, entropy, pick
from thaw.engines.served.sampling_extra import SamplingExtra
from thaw.engines.session.bad_words import endings


class Row:
    """One thaw request in the batch. `output` is kept by whoever made the row, and grows with each step. `ends`: the
    server's own ids of an end of text, for an extra that names none. `tell`, where the extra asks for entropies, gets
    that of each step, with the index of the step's token in `output`."""

    def __init__(
        self,
        ends: Iterable[int],
        extra: SamplingExtra,
        prompt: list[int],
        output: list[int],
        tell: Callable[[int, float], None] | None = None,
    ) -> None:
        s = extra.sampling
        self._tell = tell if s.entropy else None
        self._extra, self._num_prompt, self._output = extra, len(prompt), output
        ends = ends if extra.eos_token_ids is None else extra.eos_token_ids
        self._ends = frozenset((*ends, *s.stop_token_ids))
        self._seen = frozenset(prompt) if s.repetition_penalty != 1.0 else None
        self._turn = prompt[extra.output_start :]
        self._counts = Counter(self._turn) if s.frequency_penalty or s.presence_penalty else None

    def pick(self, logits_V: torch.Tensor) -> int:
        """The next token. `logits_V` float32 on the host; it is not changed."""
        if self._tell is not None:
            self._tell(len(self._output), entropy(torch.log_softmax(logits_V, 0)))
        position = self._num_prompt + len(self._output)
        return pick(logits_V, self._extra.sampling, self._extra.seed, position, self._past(position))

    def _past(self, position: int) -> Past:
        extra, counts = self._extra, self._counts
        banned = self._ends if position - extra.output_start < extra.sampling.min_tokens else frozenset[int]()
        if extra.bad_ids:
            banned |= endings(extra.bad_ids, [*self._turn, *self._new()])
        if counts is not None:
            counts = counts + Counter(self._new())
        return Past(
            banned=banned,
            seen=() if self._seen is None else self._seen.union(self._output),
            counts=counts or {},
        )

    def _new(self) -> list[int]:
        """What of the request's output belongs to the turn."""
        return self._output[max(0, self._extra.output_start - self._num_prompt) :]
