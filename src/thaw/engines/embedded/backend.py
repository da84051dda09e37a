"""What an embedded engine asks of a backend: run tokens through the model, give logits, choose tokens.

A `Row` is the backend's own value behind the next logits of one sequence (for transformers the last hidden state);
`Logits` its own batch of logits. The engine only hands them back.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from thaw.core.errors import Unsupported
from thaw.core.identity import ModelIdentity
from thaw.engines.base import Codec
from thaw.engines.embedded.pages import ExtentFactory, PagedKV
from thaw.engines.sampling.spec import Sampled, SampleSpec

Row = Any
Logits = Any
BOUNDARY_TOP = 8
"""How many of the largest log probabilities a boundary keeps."""


@dataclass
class Feed:
    """New tokens for one sequence; their KV goes to positions [kv.num_tokens, kv.num_tokens + len(tokens))."""

    kv: PagedKV
    tokens: Sequence[int]


class Backend(ExtentFactory):
    name: str
    version: str
    model: str
    device: str
    codec: Codec
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    numerics: dict[str, str]
    placeholders: Mapping[int, str] = MappingProxyType({})
    """Tokens that stand for what is no text, such as an image, and what the model's config calls them: refused."""

    @abc.abstractmethod
    def forward(self, feeds: Sequence[Feed]) -> list[Row]:
        """Run all feeds as one packed batch, write their KV, advance `kv.num_tokens`; one row a feed."""

    @abc.abstractmethod
    def logits(self, rows: Sequence[Row]) -> Logits: ...

    @abc.abstractmethod
    def sample(self, logits: Logits, specs: Sequence[SampleSpec]) -> list[Sampled]: ...

    @abc.abstractmethod
    def boundary(self, logits: Logits, index: int) -> tuple[str, tuple[tuple[int, float], ...]]:
        """(digest of the float32 logits, the BOUNDARY_TOP largest raw log probabilities) of one row."""

    @abc.abstractmethod
    def row_bytes(self, row: Row) -> tuple[bytes, str, tuple[int, ...]]:
        """(bytes, dtype, shape) of a row, to be stored."""

    @abc.abstractmethod
    def row_from(self, data: bytes, dtype: str, shape: tuple[int, ...]) -> Row:
        """The row again. Raises `CorruptBlob` when dtype, shape or size are not those of this backend's rows."""

    @abc.abstractmethod
    def identity(self) -> ModelIdentity:
        """Hash the model as it is now (policy is filled in by the engine)."""

    @abc.abstractmethod
    def weights_sample(self) -> str:
        """A quick digest of some elements of every weight: notices changes that nobody announced."""

    def weights_of(self, source: str | Path) -> Callable[[], None]:
        """Read the weights of `source`, on any thread; calling the result puts them in place of those that run. Raises
        as `Engine.update_weights` does."""
        raise Unsupported(f"engine {self.name} does not change its weights while it runs; load another one")

    def require_sleep(self, level: int) -> None:
        """Raise `Unsupported` where `sleep` cannot."""
        if level > 1:
            raise Unsupported(f"engine {self.name} cannot drop its weights and read them again; sleep with level 1")

    def sleep(self, level: int) -> None:
        """Take the weights off the accelerator, and with level 2 out of memory. By default they stay where they are."""

    def free(self) -> None:
        """It sleeps, and its pages are let go of: hand back to the accelerator what is kept for later use."""

    def wake(self) -> None:
        """Bring back the weights that ran, also after a `sleep` that failed half-way. Raises as `weights_of` does; may
        then be called again."""

    def close(self) -> None:
        """Let go of the model."""
