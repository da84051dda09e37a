"""The doctor, by a config.json alone, and a boot say the same of every kind of causal model that transformers ships."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from recurrent_shapes import SHAPES as RECURRENT  # noqa: E402
from thaw import load_engine  # noqa: E402
from thaw.core.cache import token_nbytes  # noqa: E402
from thaw.core.errors import InvalidRequest, Unsupported  # noqa: E402
from thaw.doctor import model as doctor  # noqa: E402
from thaw.doctor.report import ModelReport  # noqa: E402
from thaw.engines.transformers.support import ONE_MASK, RUNS, WITH_TEXT  # noqa: E402

SHIPPED = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALLER = {"head_dim": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 32}
SMALLER |= {"num_experts_per_tok": 2, "n_layer": 2, "num_layers": 2, "sliding_window": 40}
ALL = ["full_attention"] * 2
MIXED = ["sliding_attention", "full_attention"]
MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "head_dim": 8, "num_experts_per_tok": 2,
}  # fmt: skip
WHOLE: dict[str, dict[str, Any]] = {
    **{kind: {"layer_types": ALL} for kind in ("afmoe", "cwm", "exaone_moe", "gemma3_text", "kolibri1", "olmo3")},
    **{kind: MLA for kind in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu")},
    **{kind: {"layer_types": MIXED} for kind in ("cohere2", "cohere2_moe", "gpt_oss", "mimo_v2_flash")},
    **RECURRENT,
    "qwen3_5_moe_text": RECURRENT["qwen3_next"],
    "codegen": {"rotary_dim": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": MIXED * 2, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 320, "laurel_rank": 8, "intermediate_size": 96,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "num_hidden_layers": 4, "layer_types": MIXED * 2, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 320, "global_head_dim": 32, "intermediate_size": 96,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 40},
    "gptj": {"rotary_dim": 8},
    "llama4_text": {"num_local_experts": 2, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 96},
    "dots1": {
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "exaone4": {"sliding_window": None, "layer_types": ALL},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ALL, "num_dense_layers": 1},
    "lfm3": {"sliding_window": None, "layer_types": ALL},
    "ministral": {"layer_types": MIXED, "head_dim": 16},
    "mistral": {"sliding_window": None},
    "nanochat": {"final_logit_softcapping": None},
}  # fmt: skip
"""What makes every layer see all, where that is not a kind's default, and what a kind needs to be small."""


def small(kind: str, **fields: Any) -> Any:
    """A config of that kind with few small layers, as far as it has such fields."""
    own = AutoConfig.for_model(kind)
    names, known = own.attribute_map or {}, own.to_dict()
    wanted = {names.get(name, name): value for name, value in SMALL.items()}
    wanted |= {name: value for name, value in SMALLER.items() if known.get(name) is not None}
    wanted = {name: value for name, value in wanted.items() if name in known}
    return AutoConfig.for_model(kind, **{**wanted, **WHOLE.get(kind, {}), **fields})


def some(kind: str) -> Any:
    """`small`, or for models of several parts the kind's default."""
    try:
        return small(kind)
    except Exception:  # noqa: BLE001 - each kind has a way of its own to say that it has no such shape
        return AutoConfig.for_model(kind)


def examined(config: Any, folder: Path) -> ModelReport:
    """What the doctor says of it, from its config.json alone."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    config.architectures = [name if isinstance(name, str) else name[0]]
    config.to_json_file(folder / "config.json")
    return doctor.report(*doctor.read_config(folder))


def draw(module: Any) -> None:
    """Weights with which each layer passes on what attention brings."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)


def cache_of(module: Any) -> list[tuple[int, int]]:
    """Bytes of a token's keys and values in each layer of the stock model's own cache."""
    with torch.inference_mode():
        kept = module.eval()(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    attending = [layer for layer in kept.layers if getattr(layer, "keys", None) is not None]
    both = [(layer.keys, layer.values) for layer in attending]
    return [(keys.nbytes // 3, values.nbytes // 3) for keys, values in both]


@pytest.mark.slow("boots a model of every kind")
@pytest.mark.parametrize("kind", sorted(RUNS & set(SHIPPED)))
def test_what_the_doctor_calls_supported_boots(kind: str, tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    said = examined(small(kind), tmp_path)
    assert said.supported, said.reasons
    module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    draw(module)
    module.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model("llama") / name, tmp_path)
    assert doctor.report(*doctor.read_config(tmp_path)).reasons == (), "of the file that the model wrote, too"
    with load_engine("transformers", model=str(tmp_path)) as engine:
        assert tuple(map(str, engine.info.groups)) == said.cache_groups
        assert said.max_model_len in (engine.info.max_model_len, None)
        assert token_nbytes(engine.info.groups) == sum(map(sum, cache_of(module)))


@pytest.mark.slow("builds a model of every kind")
@pytest.mark.parametrize("kind", SHIPPED)
def test_what_the_doctor_refuses_does_not_boot(kind: str, tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """On the meta device, for the smallest of some have billions of weights."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    try:
        said = examined(some(kind), tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
    except Exception:  # noqa: BLE001 - neither can read such a config
        assert kind not in RUNS
        return
    if said.supported:
        assert config.model_type in RUNS | WITH_TEXT
        return
    try:
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config)
    except Exception:  # noqa: BLE001 - what transformers cannot build does not boot
        return
    with pytest.raises(Unsupported):
        load_engine("transformers", model=module, tokenizer=tokenizer)


SHAPES: dict[str, tuple[str, dict[str, Any], int]] = {
    "falcon, one head": ("falcon", {"multi_query": True, "alibi": False}, 1),
    "falcon, all heads": ("falcon", {"multi_query": False, "alibi": False}, 4),
    "falcon, newer": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}, 2),
    "falcon, ALiBi": ("falcon", {"multi_query": True, "alibi": True}, 1),
    "gpt_bigcode": ("gpt_bigcode", {"multi_query": True}, 1),
    "gpt_bigcode, all heads": ("gpt_bigcode", {"multi_query": False}, 4),
    "granite": ("granite", {"logits_scaling": 8.0}, 2),
    "cohere": ("cohere", {"logit_scale": 0.25}, 2),
}


@pytest.mark.parametrize("name", SHAPES)
def test_heads_are_counted_as_they_are_stored(name: str, tmp_path: Path) -> None:
    """transformers repeats the heads of a newer Falcon in its cache; thaw stores each once."""
    kind, fields, heads = SHAPES[name]
    config = small(kind, **fields)
    said = examined(config, tmp_path)
    assert said.supported and said.num_kv_heads == heads
    assert said.kv_token_nbytes == 2 * 2 * heads * 16 * 4
    repeats = 2 if "new_decoder_architecture" in fields else 1
    assert cache_of(AutoModelForCausalLM.from_config(config)) == [(heads * repeats * 16 * 4,) * 2] * 2


@pytest.mark.parametrize("kind", sorted(ONE_MASK))
@pytest.mark.parametrize("types", [MIXED, ALL], ids=["mixed", "all full"])
def test_a_window_that_the_class_would_give_to_layers_without_one_is_refused(
    kind: str, types: list[str], tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    """transformers reads such a config: its cache follows the layer types, and its mask the window alone. So the stock
    class fails past the window, or attends to less than the layer types say."""
    config = small(kind, layer_types=types, sliding_window=40, use_sliding_window=True)
    module = AutoModelForCausalLM.from_config(config).eval()
    draw(module)
    reason = rf"layers without a window beside sliding_window=40.*type {kind} gives every layer"
    with pytest.raises(Unsupported, match=reason):
        load_engine("transformers", model=module, tokenizer=AutoTokenizer.from_pretrained(tiny_model("llama")))
    assert [reason for reason in examined(config, tmp_path).reasons if "gives every layer that window" in reason]
    with torch.inference_mode():
        tokens, cache = torch.tensor([[*range(5, 105)]]), DynamicCache(config=module.config)
        if types is MIXED:
            module(input_ids=tokens, past_key_values=cache)
            with pytest.raises(RuntimeError, match="must match"):
                module(input_ids=tokens[:, :1], past_key_values=cache)
            return
        masked = module(input_ids=tokens).logits[0, -1]
        module.config.sliding_window = None
        assert float((masked - module(input_ids=tokens).logits[0, -1]).abs().max()) > 0.01


def write(folder: Path, text: str) -> Path:
    (folder / "config.json").write_text(text)
    return folder


def test_what_a_config_leaves_out_is_what_its_class_says(tmp_path: Path) -> None:
    """A Mistral whose config.json names no window has one of 4096 tokens."""
    folder = write(tmp_path, '{"model_type": "mistral", "architectures": ["MistralForCausalLM"]}')
    said = doctor.report(*doctor.read_config(folder))
    assert said.supported and "window 4096" in said.cache_groups[0]


def test_a_type_that_nobody_looked_at_is_refused(tmp_path: Path) -> None:
    folder = write(
        tmp_path, '{"model_type": "of_tomorrow", "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8}'
    )
    assert doctor.report(*doctor.read_config(folder)).reasons == ("thaw does not run models of type of_tomorrow yet",)


def test_a_config_of_endless_layers_is_refused_before_its_class_writes_them_down(tmp_path: Path) -> None:
    folder = write(tmp_path, '{"model_type": "qwen2", "num_hidden_layers": 1000000000000}')
    with pytest.raises(InvalidRequest, match="num_hidden_layers"):
        doctor.report(*doctor.read_config(folder))
