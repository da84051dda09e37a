"""A Hugging Face tokenizer as thaw's codec."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from thaw.core.errors import Unsupported
from thaw.core.ids import digest
from thaw.engines.base import Codec, Message
from thaw.engines.hf.pieces import FastPieces, Pieces, SlowPieces
from thaw.engines.hf.rendering import render
from thaw.engines.hf.template import ContentFit, check_variables, explained
from thaw.engines.hf.tools import schema_of

_FRAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Special tokens by their part in every text. Others say something: that a tool is called, what language follows."""


class HFCodec(Codec):
    """Of a tokenizer of transformers, or of thaw's own (`tokenizer.py`).

    `ends` are the tokens that end a text of the model. Of the special tokens, a text leaves out these and those that
    frame every text; the others are part of what the model says, and stand in it."""

    def __init__(self, tokenizer: Any, ends: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._fits: dict[str, ContentFit] = {}
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

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes | None:
        if skip_special_tokens and token_id in self._left_out:
            return b"" if self._pieces.apart else None
        return self._pieces.token_bytes(token_id)

    def _shown(self, token_ids: Sequence[int], skip_special_tokens: bool) -> list[int]:
        return [token for token in token_ids if not skip_special_tokens or token not in self._left_out]

    def chat_text(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Message] | None = None,
        variables: Mapping[str, object] | None = None,
        moment: datetime | None = None,
    ) -> str:
        more = check_variables(variables)
        if moment is not None:
            more["strftime_now"] = moment.strftime
        template = self._template(tools)
        fit = self._fits.setdefault(template, ContentFit(lambda some: self._render(template, some)))
        fitted = fit.fit(messages)
        with explained():
            return self._render(
                template, fitted, tools=tools or None, add_generation_prompt=add_generation_prompt, variables=more
            )

    def encode_chat(self, text: str, *, inside: bool = False) -> list[int]:
        return self._pieces.encode_chat_inside(text) if inside else self._pieces.encode(text)

    def tool_schema(self, function: Callable[..., object]) -> Message:
        return schema_of(function)

    def _template(self, tools: Sequence[Message] | None) -> str:
        """The model's template, or that of several which is meant for tools, or for everything."""
        found = getattr(self._tokenizer, "chat_template", None)
        if isinstance(found, dict):
            names = ("tool_use", "default") if tools else ("default",)
            found = next((found[name] for name in names if name in found), None)
        if not found:
            raise Unsupported("this model's tokenizer has no chat template; use append and generate with text")
        if not isinstance(found, str):
            raise Unsupported(f"this model's chat template is a {type(found).__name__}, and only text can be one")
        return found

    def _render(
        self, template: str, messages: list[Message], *, variables: Mapping[str, object] | None = None, **more: Any
    ) -> str:
        named = self._tokenizer.special_tokens_map
        return render(template, messages, variables={**named, **(variables or {})}, **more)

    def identity(self) -> str:
        """A digest of the vocabulary, merges, normaliser and chat template."""
        backend = self._backend
        body = backend.to_str() if backend is not None else repr(sorted(self._tokenizer.get_vocab().items()))
        return digest(f"{body}\0{getattr(self._tokenizer, 'chat_template', None)}".encode())
