"""The fake tokenizer: a token is a byte; 256 starts a message, 257 ends it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime

from thaw.engines.base import Codec, Message
from thaw.engines.content import as_text
from thaw.engines.text import whole_characters

BOS, EOS, VOCAB = 256, 257, 258
MARKS = {"<s>": BOS, "</s>": EOS}


class FakeCodec(Codec):
    def encode(self, text: str, *, first: bool) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return _bytes(token_ids, skip_special_tokens).decode(errors="replace")

    def decode_settled(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return whole_characters(_bytes(token_ids, skip_special_tokens))

    def chat_text(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Message] | None = None,
        variables: Mapping[str, object] | None = None,
        moment: datetime | None = None,
    ) -> str:
        """Messages one after the other; tools, variables and `clock=True` (the day) stand in a first one, "setup"."""
        told = {**({"tools": list(tools)} if tools else {}), **(variables or {})}
        if told.get("clock"):
            told["clock"] = (moment or datetime.now()).strftime("%Y-%m-%d")
        setup: list[Message] = [{"role": "setup", "content": json.dumps(told, ensure_ascii=False)}] if told else []
        text = "".join(f"<s>{_said(i, message)}</s>" for i, message in enumerate([*setup, *messages], -len(setup)))
        return f"{text}<s>assistant\n" if add_generation_prompt else text

    def encode_chat(self, text: str, *, inside: bool = False) -> list[int]:
        pieces = re.split("(</?s>)", text)
        return [t for piece in pieces for t in ([MARKS[piece]] if piece in MARKS else piece.encode())]


def _said(number: int, message: Message) -> str:
    where = f"message {number}"
    calls = message.get("tool_calls")
    called = json.dumps(calls, ensure_ascii=False) if calls else ""
    return f"{message.get('role')}\n{as_text(message, where)['content']}{called}"


def _bytes(token_ids: Sequence[int], skip_special_tokens: bool) -> bytes:
    marks = {} if skip_special_tokens else {BOS: b"<s>", EOS: b"</s>"}
    return b"".join(bytes([t]) if t < 256 else marks.get(t, b"") for t in token_ids)
