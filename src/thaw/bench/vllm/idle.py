"""Plain requests in a vLLM with thaw's connector, which has nothing to do, against one with nothing of thaw.

What one boot is faster than the next is more than one batch differs from the next, so a round is a boot of both.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from thaw.bench.rounds import Rounds
from thaw.bench.sample import Sample
from thaw.bench.vllm.arms import Document, fresh_salt, sample_of
from thaw.bench.vllm.options import Options

if TYPE_CHECKING:
    from thaw.bench.vllm.plain import Plain


def measure(rounds: Rounds, options: Options, boot: int, plain: Plain, stock: Plain, document: Document) -> None:
    """The round `boot`, in the engines of that boot."""
    rounds.repeat(
        boot,
        options.idle_rounds,
        {"idle": partial(_batch, plain, options, document), "stock": partial(_batch, stock, options, document)},
    )


def _batch(plain: Plain, options: Options, document: Document) -> Sample:
    """All requests at once, read and answered; nothing of an earlier batch is found in the cache."""
    from thaw.bench.vllm.plain import PlainRequest

    salt = fresh_salt()
    requests = [
        PlainRequest(tokens=document.session(options.idle_prompt, i), max_tokens=options.idle_tokens, salt=salt)
        for i in range(options.idle_requests)
    ]
    batch = plain.run(requests)
    sample = sample_of(batch, sum(len(request.tokens) for request in requests), 0)
    rate = sum(len(result.token_ids) for result in batch.results) / batch.total_s
    return Sample(
        values={**sample.values, "tokens_per_s": rate},
        stages_s=sample.stages_s,
        hits=sample.hits,
        outputs=sample.outputs,
    )
