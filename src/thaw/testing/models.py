"""Small random models that *look* at their KV: real Hugging Face folders of a few hundred kilobytes.

With the usual initialisation (a deviation of 0.02 or less) a narrow model's output depends on its last token alone,
and every wrong cache passes. Here each weight matrix is drawn with deviation 1/sqrt(fan_in), embeddings with 1, norms
around 1, so each layer passes on what attention brings, and one wrong value vector anywhere moves the logits
(`tests/test_testing_models.py` holds that).

The folders are plain: `config.json`, safetensors, a byte-level tokenizer without merges and a chat template.
Everything follows from (arch, dtype, seed). Imports torch and transformers, when called.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["ARCHITECTURES", "VOCAB_SIZE", "make_random_adapter", "make_random_model"]

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt_neox")
VOCAB_SIZE = 320  # 256 bytes, 3 special tokens, the rest unused: as real models pad their vocabulary
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# As with many fine-tunes the config names another end of text than the tokenizer, whose <|im_end|> ends a turn.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 257,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
# Grouped-query attention where the architecture has it; every shape another, so that no test passes by a lucky shape.
_SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "qwen2": {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2},
    "qwen3": {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32},
    "gpt_neox": {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 128},
}


def make_random_model(arch: str, out_dir: Path, *, dtype: str = "float32", seed: int = 0, **shape: int) -> Path:
    """Writes a model and its tokenizer into `out_dir`, made if missing, and returns it.

    `arch` is one of `ARCHITECTURES`; `dtype` a name of torch's, such as "float32" or "bfloat16"; `shape` replaces
    fields of its config (head_dim=64). The same arguments and versions of torch and transformers write the same bytes.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if arch not in _SHAPES:
        raise ValueError(f"no shape for architecture {arch!r}; there are {', '.join(ARCHITECTURES)}")
    out_dir.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(arch, **(_COMMON | _SHAPES[arch] | shape))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _draw_weights(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(out_dir)
    _tokenizer().save_pretrained(out_dir)
    return out_dir


def make_random_adapter(model: Path, out_dir: Path, *, seed: int = 0, rank: int = 8) -> Path:
    """Writes a LoRA adapter of a model of `make_random_model`, as PEFT does, into `out_dir`, and returns it.

    It is on the projections of queries, keys and values, and moves them by about as much as they are long: whatever is
    computed under it has other KV and other log probabilities.
    """
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads", "v_proj": "num_key_value_heads"}
    hidden, drawn = config["hidden_size"], {}
    for layer in range(config["num_hidden_layers"]):
        for module, count in heads.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            for part, shape in (("A", (rank, hidden)), ("B", (config[count] * config["head_dim"], rank))):
                generator = torch.Generator().manual_seed(_stream(seed, f"{name}.{part}"))
                noise = torch.randn(shape, generator=generator)
                drawn[f"{name}.lora_{part}.weight"] = noise * float(shape[1] ** -0.5)
    out_dir.mkdir(parents=True, exist_ok=True)
    save_file(drawn, out_dir / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
    (out_dir / "adapter_config.json").write_text(json.dumps({**said, "target_modules": list(heads)}))
    return out_dir


def _draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Overwrites each parameter from its own stream of (seed, name): adding a layer changes no other tensor."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(_stream(seed, name))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(_scale(name, noise))


def _scale(name: str, noise: torch.Tensor) -> torch.Tensor:
    if name.endswith(("embed_tokens.weight", "embed_in.weight")):
        return noise
    if noise.ndim == 2:
        return noise * float(noise.shape[1] ** -0.5)  # [out, in]: deviation 1/sqrt(fan_in)
    if name.endswith("bias"):
        return noise * 0.1
    return 1 + noise * 0.1  # the gain of a norm


def _stream(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


def _tokenizer() -> Any:
    """A byte is a token: ids 0..255 are the byte-level alphabet in byte order, 256..258 the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(BPE(vocab={symbol: byte for byte, symbol in enumerate(_byte_symbols())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = _COMMON["max_position_embeddings"]
    return tokenizer


def _byte_symbols() -> list[str]:
    """The character that stands for each byte, as in GPT-2: itself where printable, else U+0100 and up in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]
