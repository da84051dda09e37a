"""Tokens by thaw's rules inside SGLang's sampler.

SGLang draws from a generator that a resumed request has lost, and ignores a request's seed unless all of the engine is
deterministic. So thaw sends its requests as greedy ones with their own parameters beside them; the token is chosen by
`served.row`, a pure function of (logits, parameters, seed, position, tokens so far), from the raw logits. Rows of other
requests are not touched, and a batch without thaw's requests costs one look at an empty dict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from thaw.engines.served.row import Row
from thaw.engines.served.sampling_extra import SamplingExtra


class Chosen:
    """One request's row: its prompt's length and what was chosen so far, by position."""

    def __init__(
        self, extra: SamplingExtra | None, prompt: list[int], tell: Callable[[int, float], None] | None = None
    ) -> None:
        """`tell` gets entropies, where the request asks for them (`Row`)."""
        self._num_prompt = len(prompt)
        self._output: list[int] = []
        self._row = None if extra is None else Row((), extra, prompt, self._output, tell)

    def next(self, logits_V: torch.Tensor, num_tokens: int) -> int | None:
        """The token after `num_tokens`; None in the middle of the prompt, where nobody looks at it.

        A request that SGLang put back in the queue stands where it stood before: what came later is dropped."""
        count = num_tokens - self._num_prompt
        if count < 0:
            return None
        assert count <= len(self._output), f"{count} tokens were generated, {len(self._output)} were seen"
        del self._output[count:]
        token = int(logits_V.argmax()) if self._row is None else self._row.pick(logits_V)
        self._output.append(token)
        return token


def sample(
    original: Callable[..., torch.Tensor], rows: Sequence[tuple[int, Chosen]], runner: Any, output: Any, batch: Any
) -> torch.Tensor:
    """`ModelRunner.sample` where `rows` of the batch are thaw's."""
    indices = torch.tensor([index for index, _ in rows], device=output.next_token_logits.device)
    raw = output.next_token_logits[indices].float()
    chosen = original(runner, output, batch)
    host = raw.cpu()
    seq_lens = batch.seq_lens_cpu if batch.seq_lens_cpu is not None else batch.seq_lens.cpu()
    logprobs = torch.log_softmax(raw, dim=-1) if batch.return_logprob else None
    for i, (index, row) in enumerate(rows):
        token = row.next(host[i], int(seq_lens[index]))
        if token is None:
            continue
        chosen[index] = token
        if logprobs is not None and output.next_token_logprobs is not None:
            output.next_token_logprobs[index] = logprobs[i, token]
            _tops(output, index, logprobs[i], batch.top_logprobs_nums)
    return chosen


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
