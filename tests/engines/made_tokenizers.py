"""Small tokenizers of the kinds that models come with, and a codec that others might write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from thaw.engines.base import Codec, Message

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!'"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def sentencepiece(
    prefix: str = "first", *, around: str = "<s> $A", specials: Iterable[str] = (), merges: Iterable[str] = ()
) -> Any:
    """As Llama 2, Mistral and Phi-3 have them: words begin with "▁", what is not in the vocabulary is bytes.

    `prefix`: "first" or "always" as of Metaspace, or "normalizer" (the older form). `around`: the post-processor."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    pairs = [(word[: i + 1], word[i + 1]) for word in merges for i in range(len(word) - 1)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *(a + b for a, b in pairs)]))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if prefix == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prefix, split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1),
        ]
    )  # fmt: skip
    backend.add_special_tokens(["<s>", "</s>", *specials])
    backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def byte_level(*, specials: Iterable[str] = (), add_prefix_space: bool = False, merges: Iterable[bytes] = ()) -> Any:
    """As GPT-2, Llama 3 and Qwen have them; `merges` become tokens of several bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from thaw.engines.hf.pieces import byte_level_alphabet

    symbols = {byte: symbol for symbol, byte in byte_level_alphabet().items()}
    words = ["".join(symbols[byte] for byte in word) for word in merges]
    pairs = [(word[: i + 1], word[i + 1]) for word in words for i in range(len(word) - 1)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*symbols.values(), *(a + b for a, b in pairs)]))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *specials])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def byte_tokens(tokenizer: Any, data: bytes) -> list[int]:
    """The token of each byte."""
    from thaw.engines.hf.pieces import byte_level_alphabet

    if tokenizer.convert_tokens_to_ids("<0x00>") == tokenizer.unk_token_id:
        symbols = {byte: symbol for symbol, byte in byte_level_alphabet().items()}
        return [tokenizer.convert_tokens_to_ids(symbols[byte]) for byte in data]
    return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]


class PlainCodec(Codec):
    """Bytes, and only what the contract asks for: it does not say where a character has only begun."""

    def encode(self, text: str, *, first: bool) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(token_ids).decode(errors="replace")

    def chat_text(self, messages: Sequence[Message], **settings: Any) -> str:
        raise NotImplementedError

    def encode_chat(self, text: str, *, inside: bool = False) -> list[int]:
        raise NotImplementedError
