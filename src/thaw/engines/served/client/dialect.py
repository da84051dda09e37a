"""Where one server's API differs from another's: its sampling parameters, what it cannot do, where it counts."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

from thaw.core.errors import BadSampling
from thaw.core.objects import Turn
from thaw.core.sampling import Sampling
from thaw.engines.base import Codec, EngineInfo
from thaw.engines.served.client.transport import Chunk
from thaw.engines.served.protocol import EngineFacts
from thaw.engines.session.bad_words import check as check_sampling
from thaw.engines.session.turns import OpenTurn


class Dialect(abc.ABC):
    """One server's, with its `facts`. Nothing here is said to the server."""

    one_token: ClassVar[dict[str, Any]] = {"temperature": 0.0, "max_tokens": 1, "ignore_eos": True}
    """The server's sampling parameters for one token that nobody looks at."""

    def __init__(self, facts: EngineFacts, info: EngineInfo, codec: Codec) -> None:
        self.facts, self.info, self.codec = facts, info, codec

    @abc.abstractmethod
    def fields(self, turn: OpenTurn, num_tokens: int) -> dict[str, Any]:
        """The server's sampling parameters for what is left of a turn, when the session has `num_tokens` tokens."""

    def check(self, sampling: Sampling) -> None:
        """Raise `BadSampling` or `Unsupported` for what this server cannot sample with."""
        if sampling.structured_outputs is not None and self.facts.reasons:
            raise BadSampling(
                f"structured_outputs: this {self.facts.engine} runs with a reasoning parser, so a grammar begins where "
                "the reasoning ends, and a session cannot go on in its middle; start the server without the parser, or "
                "leave structured_outputs out"
            )
        grammars = "structured" in self.info.capabilities
        check_sampling(sampling, self.codec, self.info.vocab_size, structured=grammars)
        most = self.facts.max_logprobs
        if (sampling.logprobs or 0) > most:
            raise BadSampling(
                f"logprobs={sampling.logprobs}: this {self.facts.engine} gives at most {most} (its --max-logprobs)"
            )

    def check_resume(self, last: Turn, output: Sequence[int]) -> None:
        """Raise `Unsupported` where this server cannot go on exactly with `last`, whose tokens are `output` so far."""
        return

    def num_cached(self, chunk: Chunk) -> int | None:
        """The server's own count of cached tokens, where thaw inside it is not asked for that."""
        return None
