"""A Hugging Face tokenizer as thaw's codec."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from thaw.core.errors import Unsupported
from thaw.core.ids import digest
from thaw.engines.base import Codec, Message
from thaw.engines.hf.rendering import render
from thaw.engines.hf.template import ContentFit, check_variables, explained
from thaw.engines.hf.tools import schema_of


class HFCodec(Codec):
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._fits: dict[str, ContentFit] = {}

    def encode(self, text: str, *, first: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=first))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

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

    def encode_chat(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

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
        return str(found)

    def _render(
        self, template: str, messages: list[Message], *, variables: Mapping[str, object] | None = None, **more: Any
    ) -> str:
        named = self._tokenizer.special_tokens_map
        return render(template, messages, variables={**named, **(variables or {})}, **more)

    def identity(self) -> str:
        """A digest of the vocabulary, merges, normaliser and chat template."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        body = backend.to_str() if backend is not None else repr(sorted(self._tokenizer.get_vocab().items()))
        return digest(f"{body}\0{getattr(self._tokenizer, 'chat_template', None)}".encode())
