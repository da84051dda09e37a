"""Tokens by thaw's rules inside SGLang's sampler.

SGLang draws from a generator that a resumed request has lost, and ignores a request's seed unless all of the engine is
deterministic. So thaw sends its requests as greedy ones with their own parameters beside them; the token is chosen by
`served.worker.sampler`, a pure function of (logits, parameters, seed, position, tokens so far), from the raw logits.
Rows of other requests are not touched, and a batch without thaw's requests costs one look at an empty dict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from thaw.core.errors import ThawError
from thaw.engines.served.guard import guarded, unheard
from thaw.engines.served.sampling_extra import SamplingExtra
from thaw.engines.served.worker.sampler import Row


class Chosen:
    """One request's row: its prompt's length and what was chosen so far, by position."""

    def __init__(
        self, extra: SamplingExtra | None, prompt: list[int], tell: Callable[[int, float], None] | None = None
    ) -> None:
        """`tell` gets entropies, where the request asks for them (`Row`). `failed` hears why a token could not be
        chosen."""
        self.failed: Callable[[ThawError], None] = unheard
        self._num_prompt = len(prompt)
        self._output: list[int] = []
        self._row = None if extra is None else Row((), extra, prompt, self._output, tell)

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the likeliest token of the raw logits, which the device finds by itself."""
        return self._row is None

    def is_due(self, num_tokens: int) -> bool:
        """Whether the token after `num_tokens` is looked at: not in the middle of the prompt."""
        return num_tokens >= self._num_prompt

    def pick(self, logits_V: torch.Tensor, num_tokens: int) -> int:
        """The token after `num_tokens`, of a row that is due and not greedy. `logits_V` on the host.

        A request that SGLang put back in the queue stands where it stood before: what came later is dropped."""
        assert self._row is not None
        count = num_tokens - self._num_prompt
        assert count <= len(self._output), f"{count} tokens were generated, {len(self._output)} were seen"
        del self._output[count:]
        token = self._row.pick(logits_V)
        self._output.append(token)
        return token


def sample(
    original: Callable[..., torch.Tensor], rows: Sequence[tuple[int, Chosen]], runner: Any, output: Any, batch: Any
) -> torch.Tensor:
    """`ModelRunner.sample` where `rows` of the batch are thaw's. Rows that are all greedy are not waited for."""
    seq_lens = batch.seq_lens_cpu if batch.seq_lens_cpu is not None else batch.seq_lens.cpu()
    due = [(index, row) for index, row in rows if row.is_due(int(seq_lens[index]))]
    if not due:
        return original(runner, output, batch)
    indices = _sent([index for index, _ in due], output.next_token_logits.device)
    raw_RV = output.next_token_logits[indices].float()
    chosen = original(runner, output, batch)
    tokens_R = _tokens(due, raw_RV, seq_lens)
    chosen[indices] = tokens_R.to(chosen.dtype)
    if batch.return_logprob and output.next_token_logprobs is not None:
        logprobs_RV = torch.log_softmax(raw_RV, dim=-1)
        picked_R = logprobs_RV.gather(1, tokens_R[:, None])[:, 0]
        output.next_token_logprobs[indices] = picked_R.to(output.next_token_logprobs.dtype)
        for (index, _), logprobs_V in zip(due, logprobs_RV, strict=True):
            _tops(output, index, logprobs_V, batch.top_logprobs_nums)
    return chosen


def _tokens(rows: Sequence[tuple[int, Chosen]], raw_RV: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
    """Their next tokens, on the logits' device. Only for rows that are not greedy the logits come to the host."""
    tokens_R = raw_RV.argmax(dim=-1)
    picking = [(i, index, row) for i, (index, row) in enumerate(rows) if not row.is_greedy]
    if picking:
        host_RV = raw_RV.cpu()
        for i, index, row in picking:
            token = guarded(partial(row.pick, host_RV[i], int(seq_lens[index])), row.failed)
            if token is not None:  # else its request ends, and nobody sees this one
                tokens_R[i] = token
    return tokens_R


def _sent(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """On the device, without waiting for what it is doing."""
    if device.type == "cpu":
        return torch.tensor(numbers)
    return torch.tensor(numbers, pin_memory=True).to(device, non_blocking=True)


def _tops(output: Any, index: int, logprobs_V: torch.Tensor, wanted: Sequence[int] | None) -> None:
    """The likeliest tokens of the raw distribution, whatever the other rows' parameters made of the batch's."""
    count = wanted[index] if wanted else 0
    values = getattr(output, "next_token_top_logprobs_val", None)
    if not count or values is None:
        return
    top = logprobs_V.topk(count)
    values[index] = _like(values[index], top.values)
    ids = output.next_token_top_logprobs_idx
    ids[index] = _like(ids[index], top.indices)


def _like(old: Any, new: torch.Tensor) -> Any:
    """A list where there was one."""
    return new.to(old.dtype) if isinstance(old, torch.Tensor) else new.tolist()
