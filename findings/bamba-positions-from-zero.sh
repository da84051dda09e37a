#!/bin/sh
# transformers 5.23.0: Bamba counts positions from 0 after a cache, unless it is given `position_ids`.
#
# `position_ids` may be left out. Granite-4's hybrid class then counts on from the length of the cache. Bamba's counts the
# tokens of the pass alone, so their rotary embedding is that of the first tokens: the logits have the same bits as with
# positions from 0. With the right `position_ids` both agree with one pass over all tokens.
#
# Seen (small random models, 32 tokens in the cache, 8 more; largest difference of the last token's log probabilities
# from those of one pass over all 40):
#                       positions given    left out
#   bamba               1.6e-06            5.0e-01
#   granitemoehybrid    1.2e-06            1.2e-06
#
# Exits 0 while that is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0 numpy==2.4.6
cat > "$folder/positions.py" <<'PROGRAM'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()
TOKENS, PAST = 40, 32
IDS = torch.randint(0, 256, (1, TOKENS), generator=torch.Generator().manual_seed(0))
SHAPE = {
    "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 4, "initializer_range": 0.125, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2,
    "mamba_d_state": 8,
}  # fmt: skip
KINDS = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2, "num_local_experts": 0,
        "shared_intermediate_size": 128, "position_embedding_type": "rope",
    },
}  # fmt: skip


def last(model, start=None):
    """The last token's log probabilities, read after a cache of the first tokens; `start` gives the positions."""
    cache = model(IDS[:, :PAST], use_cache=True).past_key_values
    more = {} if start is None else {"position_ids": torch.arange(start, start + TOKENS - PAST)[None]}
    out = model(IDS[:, PAST:], past_key_values=cache, **more)
    return out.logits[0, -1].double().log_softmax(-1)


as_described = True
with torch.no_grad():
    for kind, more in KINDS.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **SHAPE, **more)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        whole = model(IDS).logits[0, -1].double().log_softmax(-1)
        given, left_out, zero = last(model, PAST), last(model), last(model, 0)
        off = [float((one - whole).abs().max()) for one in (given, left_out)]
        from_zero = torch.equal(left_out, zero)
        print(f"  {kind}: positions given {off[0]:.1e}, left out {off[1]:.1e}, as if counted from 0: {from_zero}")
        as_described &= off[0] < 1e-4 and from_zero == (kind == "bamba") == (off[1] > 0.01)
print(f"transformers {transformers.__version__}, torch {torch.__version__}: {as_described}")
sys.exit(0 if as_described else 1)
PROGRAM
"$folder/venv/bin/python" "$folder/positions.py"
