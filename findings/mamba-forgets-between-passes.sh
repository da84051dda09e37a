#!/bin/sh
# transformers 5.23.0, CPU: Jamba, Mamba and Falcon-Mamba forget the recurrent state when several tokens follow a cache.
#
# A pass of one token goes on from the cached state. A pass of several (the next chunk of a long prompt, a second turn)
# goes on from the cached convolution, but its scan starts from zero. The logits have the same bits as with a cache whose
# recurrent states were set to zero. Mamba2 goes on from the cached state in both kinds of pass. No kernel packages are installed here: this is the PyTorch code.
#
# Seen (small random models, 32 tokens in the cache, 8 more; largest difference of the last token's log probabilities
# from those of one pass over all 40):
#                   one by one    together
#   jamba           7.0e-06       1.3e-01
#   mamba           1.1e-06       9.0e-02
#   falcon_mamba    2.4e-06       4.9e-01
#   mamba2          2.8e-06       1.5e-06
#
# Exits 0 while that is so, 1 when it is not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0 numpy==2.4.6
cat > "$folder/passes.py" <<'PROGRAM'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()
TOKENS, PAST = 40, 32
IDS = torch.randint(0, 256, (1, TOKENS), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 4, "initializer_range": 0.125}
ATTENTION = {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA1 = {**SMALL, "state_size": 8, "time_step_rank": 8}
SHAPES = {
    "jamba": {
        **SMALL, **ATTENTION, "attn_layer_period": 4, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 8,
        "mamba_dt_rank": 8,
    },
    "mamba": MAMBA1,
    "falcon_mamba": MAMBA1,
    "mamba2": {**SMALL, "num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 8, "chunk_size": 64},
}  # fmt: skip


def last(model, cuts, forget=False):
    """The last token's log probabilities, with the tokens read in passes that end at these cuts."""
    more = {}
    for start, end in zip([0, *cuts], [*cuts, TOKENS]):
        if forget and more:
            for layer in next(iter(more.values())).layers:
                for state in getattr(layer, "recurrent_states", {}).values():
                    state.zero_()
        out = model(IDS[:, start:end], use_cache=True, **more)
        name = "past_key_values" if "past_key_values" in out else "cache_params"
        more = {name: out[name]}
    return out.logits[0, -1].double().log_softmax(-1)


as_described = True
with torch.no_grad():
    for kind, shape in SHAPES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape), dtype=torch.float32).eval()
        whole, chunk, zeroed = last(model, []), last(model, [PAST]), last(model, [PAST], forget=True)
        steps, together = (float((one - whole).abs().max()) for one in (last(model, range(PAST, TOKENS)), chunk))
        forgets = torch.equal(chunk, zeroed)
        print(f"  {kind}: one by one {steps:.1e}, together {together:.1e}, as with states of zero: {forgets}")
        as_described &= steps < 1e-4 and forgets == (kind != "mamba2") == (together > 100 * steps)
print(f"transformers {transformers.__version__}, torch {torch.__version__}: {as_described}")
sys.exit(0 if as_described else 1)
PROGRAM
"$folder/venv/bin/python" "$folder/passes.py"
