"""Write a model of Llama-3.1-8B's shape with scaled random weights: `python make_model.py FOLDER [layers]`.

Drawn as `thaw.testing.models` draws its small ones, deviation 1/sqrt(fan_in), so that the model looks at its KV: with
the usual tiny weights every wrong cache would pass. Needs a CUDA device, 16 GB of disk, half a minute.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from thaw.testing.models import make_random_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256,
}  # fmt: skip


def main(folder: Path, layers: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, "num_hidden_layers": layers}
    hidden, inner, vocab = (int(config[name]) for name in ("hidden_size", "intermediate_size", "vocab_size"))  # type: ignore[call-overload]
    heads, kv_heads = (int(config[n]) * 128 for n in ("num_attention_heads", "num_key_value_heads"))  # type: ignore[call-overload]
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        noise = torch.randn(rows, columns, generator=generator, device="cuda", dtype=torch.float32)
        return (noise * (scale * columns**-0.5)).to(torch.bfloat16).cpu()

    def gain() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    shards: dict[str, dict[str, torch.Tensor]] = {
        "outer": {
            "model.embed_tokens.weight": draw(vocab, hidden, hidden**0.5),
            "model.norm.weight": gain(),
            "lm_head.weight": draw(vocab, hidden, 3.0),
        }
    }
    index = {}
    for layer in range(layers):
        p = f"model.layers.{layer}."
        shards[f"layer-{layer:02}"] = {
            p + "self_attn.q_proj.weight": draw(heads, hidden, 1.5),
            p + "self_attn.k_proj.weight": draw(kv_heads, hidden, 1.5),
            p + "self_attn.v_proj.weight": draw(kv_heads, hidden, 2.0),
            p + "self_attn.o_proj.weight": draw(hidden, heads, 2.0),
            p + "mlp.gate_proj.weight": draw(inner, hidden),
            p + "mlp.up_proj.weight": draw(inner, hidden),
            p + "mlp.down_proj.weight": draw(hidden, inner),
            p + "input_layernorm.weight": gain(),
            p + "post_attention_layernorm.weight": gain(),
        }
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    with tempfile.TemporaryDirectory() as small:
        for file in make_random_model("llama", Path(small)).iterdir():
            if "token" in file.name or "chat" in file.name:
                text = file.read_text().replace('"model_max_length": 4096', '"model_max_length": 131072')
                if file.name == "tokenizer.json":
                    text = _every_id_a_word(text, vocab)
                (folder / file.name).write_text(text)
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _every_id_a_word(tokenizer: str, vocab: int) -> str:
    """What a random model samples is text like any other: an id without a word costs vLLM's detokenizer dear."""
    parts = json.loads(tokenizer)
    known = parts["model"]["vocab"]
    taken = {*known.values(), *(token["id"] for token in parts["added_tokens"])}
    parts["model"]["vocab"] = known | {f"w{i}": i for i in range(vocab) if i not in taken}
    return json.dumps(parts)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 32)
