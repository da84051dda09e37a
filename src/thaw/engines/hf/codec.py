"""A Hugging Face tokenizer as thaw's codec."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from thaw.core.errors import Unsupported
from thaw.core.ids import digest
from thaw.engines.base import Codec
from thaw.engines.hf.pieces import FastPieces, Pieces, SlowPieces

_FRAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Special tokens by their part in every text. Others say something: that a tool is called, what language follows."""


class HFCodec(Codec):
    """Of a tokenizer of transformers, or of thaw's own (`tokenizer.py`).

    `ends` are the tokens that end a text of the model. Of the special tokens, a text leaves out these and those that
    frame every text; the others are part of what the model says, and stand in it."""

    def __init__(self, tokenizer: Any, ends: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._pieces: Pieces = SlowPieces(tokenizer) if self._backend is None else FastPieces(self._backend)
        frames = (getattr(tokenizer, f"{name}_token_id", None) for name in _FRAMES)
        self._left_out = frozenset((*ends, *(token for token in frames if token is not None)))

    def encode(self, text: str, *, first: bool) -> list[int]:
        return [*self._pieces.start, *self._pieces.encode(text)] if first else self._pieces.encode_inside(text)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._pieces.decode(self._shown(token_ids, skip_special_tokens))

    def decode_settled(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        shown = self._shown(token_ids, skip_special_tokens)
        text = self._pieces.decode(shown)
        return text[:-1] if text.endswith("\ufffd") and self._pieces.ends_inside(shown) else text

    def _shown(self, token_ids: Sequence[int], skip_special_tokens: bool) -> list[int]:
        return [token for token in token_ids if not skip_special_tokens or token not in self._left_out]

    def render_chat(
        self,
        messages: Sequence[dict[str, object]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[object] | None = None,
    ) -> list[int]:
        if not getattr(self._tokenizer, "chat_template", None):
            raise Unsupported("this model's tokenizer has no chat template; use append and generate with text")
        text = self._tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        return self._pieces.encode(text)

    def identity(self) -> str:
        """A digest of the vocabulary, merges, normaliser and chat template."""
        backend = self._backend
        body = backend.to_str() if backend is not None else repr(sorted(self._tokenizer.get_vocab().items()))
        return digest(f"{body}\0{getattr(self._tokenizer, 'chat_template', None)}".encode())
