"""The fake tokenizer: a token is a byte; 256 starts a message, 257 ends it."""

from __future__ import annotations

from collections.abc import Sequence

from thaw.engines.base import Codec
from thaw.engines.text import whole_characters

BOS, EOS, VOCAB = 256, 257, 258


class FakeCodec(Codec):
    def encode(self, text: str, *, first: bool) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return _bytes(token_ids, skip_special_tokens).decode(errors="replace")

    def decode_settled(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return whole_characters(_bytes(token_ids, skip_special_tokens))

    def render_chat(
        self,
        messages: Sequence[dict[str, object]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[object] | None = None,
    ) -> list[int]:
        out: list[int] = []
        for message in messages:
            out += [BOS, *f"{message['role']}\n{message['content']}".encode(), EOS]
        return [*out, BOS, *b"assistant\n"] if add_generation_prompt else out


def _bytes(token_ids: Sequence[int], skip_special_tokens: bool) -> bytes:
    marks = {} if skip_special_tokens else {BOS: b"<s>", EOS: b"</s>"}
    return b"".join(bytes([t]) if t < 256 else marks.get(t, b"") for t in token_ids)
