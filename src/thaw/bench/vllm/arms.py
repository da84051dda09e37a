"""The two sides of every comparison: thaw's children of a session, and plain requests to the same vLLM.

Both run in this process on the engine's own event loop, both are timed from the call to the last token, and the tokens
counted as cached are the engine's.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from thaw.bench.sample import Ask, Sample, tokens_digest
from thaw.bench.vllm.options import SUFFIX_TOKENS
from thaw.receipt import Hits

if TYPE_CHECKING:
    from thaw.bench.vllm.plain import Plain, PlainBatch

Tokens = tuple[int, ...]


class Document:
    """Tokens to measure with; nothing in it repeats, so that slices share no prefix."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tuple(tokens)

    def session(self, num_tokens: int, number: int = 0) -> Tokens:
        """The `number`th slice of that length."""
        found = self._tokens[number * num_tokens : (number + 1) * num_tokens]
        assert len(found) == num_tokens, "the document is too short"
        return found

    def suffixes(self, n: int) -> tuple[Tokens, ...]:
        """What each child is asked; no two alike."""
        end = len(self._tokens)
        return tuple(self._tokens[end - (i + 1) * SUFFIX_TOKENS : end - i * SUFFIX_TOKENS] for i in range(n))


def fresh_salt() -> str:
    """Under it vLLM finds nothing in its cache."""
    return f"bench:{secrets.token_hex(16)}"


def plain_children(
    plain: Plain, trunk: Tokens, salt: str, ask: Ask, *, num_wanted: int, fields: Sequence[dict[str, Any]] = ()
) -> Sample:
    """The same children as plain requests, submitted at once; blocks of earlier requests under `salt` are found by
    vLLM's prefix cache. `fields[i]` are child i's sampling, greedy without."""
    from thaw.bench.vllm.plain import PlainRequest

    requests = [
        PlainRequest(
            tokens=(*trunk, *ask.suffixes[i]), max_tokens=ask.max_tokens, salt=salt, fields=fields[i] if fields else {}
        )
        for i in range(ask.n)
    ]
    batch = plain.run(requests)
    num_prompt = sum(len(request.tokens) for request in requests)
    return sample_of(batch, num_prompt, num_wanted * ask.n)


def sample_of(batch: PlainBatch, num_prompt: int, num_wanted: int) -> Sample:
    cached = sum(result.num_cached_tokens for result in batch.results)
    rows = [result.token_ids for result in batch.results]
    return Sample(
        values={"first_token_s": batch.first_token_s, "total_s": batch.total_s},
        stages_s={"first_token": batch.first_token_s, "rest": batch.total_s - batch.first_token_s},
        hits=Hits(
            num_prompt_tokens=num_prompt,
            num_wanted_tokens=num_wanted,
            num_cached_tokens=cached,
            num_prefilled_tokens=num_prompt - cached,
        ),
        outputs={"first_tokens": tokens_digest([row[:1] for row in rows]), "tokens": tokens_digest(rows)},
    )


def read_trunk(plain: Plain, trunk: Tokens, salt: str) -> Sample:
    """Prefill `trunk` under `salt`, so that vLLM's cache has its blocks."""
    from thaw.bench.vllm.plain import PlainRequest

    batch = plain.run([PlainRequest(tokens=trunk, max_tokens=1, salt=salt)])
    return sample_of(batch, len(trunk), 0)
