"""A Hugging Face tokenizer as thaw's codec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thaw.core.errors import Unsupported
from thaw.core.ids import digest
from thaw.engines.base import Codec


class HFCodec(Codec):
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, *, first: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=first))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def render_chat(
        self,
        messages: Sequence[dict[str, object]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[object] | None = None,
    ) -> list[int]:
        if not getattr(self._tokenizer, "chat_template", None):
            raise Unsupported("this model's tokenizer has no chat template; use append and generate with text")
        return list(
            self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=False,
            )
        )

    def identity(self) -> str:
        """A digest of the vocabulary, merges, normaliser and chat template."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        body = backend.to_str() if backend is not None else repr(sorted(self._tokenizer.get_vocab().items()))
        return digest(f"{body}\0{getattr(self._tokenizer, 'chat_template', None)}".encode())
