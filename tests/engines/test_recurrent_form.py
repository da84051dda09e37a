"""How states of recurrent layers are stored is the format's: parts, their order of axes, dtypes. Pinned here, config by
config, and byte by byte against a cache layer of transformers'."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from recurrent_shapes import SHAPES
from thaw.core.cache import PointState, point_groups
from thaw.core.errors import Unsupported
from thaw.engines.hf import groups, recurrent
from thaw.engines.transformers import support

SIZES = {"vocab_size": 320, "hidden_size": 64}
FORMS = {
    "qwen3_next": "conv.q 2 × [16, 3] bfloat16, conv.k 2 × [16, 3] bfloat16, conv.v 4 × [8, 3] bfloat16, "
    "recurrent 4 × [16, 8] float32",
    "lfm2": "conv 4 × [16, 2] bfloat16",
    "granitemoehybrid": "conv.x 8 × [16, 3] bfloat16, conv.b 2 × [8, 3] bfloat16, conv.c 2 × [8, 3] bfloat16, "
    "recurrent 8 × [16, 8] float32",
}
FORMS |= {"qwen3_5_text": FORMS["qwen3_next"]}
FORMS |= dict.fromkeys(("bamba", "falcon_h1", "nemotron_h", "zamba2"), FORMS["granitemoehybrid"])
LAYERS = {"falcon_h1": "0..3", "nemotron_h": "0,2", "zamba2": "0..3", "qwen3_next": "0..2", "qwen3_5_text": "0..2"}
CHUNKS = {"lfm2": 1}


def config_of(arch: str) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    fields: dict[str, Any] = transformers.AutoConfig.for_model(arch, **SIZES, **SHAPES[arch]).to_dict()
    return fields


@pytest.mark.parametrize("arch", SHAPES)
def test_each_family_keeps_these_parts(arch: str) -> None:
    config = config_of(arch)
    found = groups.groups(config, "bfloat16")
    assert [group.name for group in found] == ["full", "state"], "those with tokens come first"
    assert str(found[1]) == f"state: layers {LAYERS.get(arch, '0,2,3')}, state of {FORMS[arch]}"
    assert recurrent.chunk(config) == CHUNKS.get(arch, 64)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("jamba", "forgets the recurrent state"),
        ("falcon_mamba", "forgets the recurrent state"),
        ("mamba", "forgets the recurrent state"),
        ("mamba2", "recurrent layers that thaw does not know"),
        ("recurrent_gemma", "does not run models of type recurrent_gemma"),
        ("kimi_linear", "does not"),
        ("olmo_hybrid", "does not know"),
        ("qwen3_next", "none of its layers attends"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(model_type: str, reason: str) -> None:
    transformers = pytest.importorskip("transformers")
    more = {"layer_types": ["linear_attention"] * 48} if model_type == "qwen3_next" else {}
    found = support.examine(transformers.AutoConfig.for_model(model_type, **more).to_dict())
    assert not found.supported and reason in "; ".join(found.reasons), found.reasons


def test_the_bytes_of_a_state_are_its_layers_without_the_oldest_column() -> None:
    """Blob by blob: [layer][channel][column] of the convolution, [layer][key][value] of the recurrence."""
    torch = pytest.importorskip("torch")
    from thaw.engines.transformers.states import GroupStates, StateLayer

    (group,) = point_groups(groups.groups(config_of("qwen3_next"), "float32"))
    assert isinstance(group, PointState) and group.num_layers == 3
    layers, channels = [StateLayer() for _ in range(3)], 2 * 2 * 16 + 4 * 8
    for number, layer in enumerate(layers):
        conv = torch.arange(channels * 4, dtype=torch.float32).view(channels, 4) + 10_000 * number
        layer.fill(conv, torch.arange(4 * 16 * 8, dtype=torch.float32).view(4, 16, 8) + 10_000 * number)
    blobs = [bytes(blob) for blob in GroupStates(group, torch.device("cpu")).read(layers)]
    assert [len(blob) for blob in blobs] == [nbytes for _, nbytes in group.blobs]
    first_channel = 0
    for (part, _), blob, head in zip(group.blobs, blobs, [0, 1, 0, 1, *range(4), *range(4)], strict=True):
        rows, columns = part.shape
        if part.name == "recurrent":
            expected = [10_000 * n + (head * rows + i) * columns + j for n, i, j in _all(3, rows, columns)]
        else:
            at = first_channel
            expected = [10_000 * n + 4 * (at + i) + j + 1 for n, i, j in _all(3, rows, columns)]
            first_channel += rows
        assert blob == struct.pack(f"<{len(expected)}f", *expected), (part.name, head)
    again = [StateLayer() for _ in range(3)]
    GroupStates(group, torch.device("cpu")).fill(again, blobs)  # type: ignore[arg-type]
    for layer, copy in zip(layers, again, strict=True):
        assert torch.equal(layer.conv_states[0][..., 1:], copy.conv_states[0][..., 1:])
        assert torch.equal(layer.recurrent_states[0], copy.recurrent_states[0])


def _all(*sizes: int) -> list[tuple[int, ...]]:
    out: list[tuple[int, ...]] = [()]
    for size in sizes:
        out = [(*one, i) for one in out for i in range(size)]
    return out


def test_which_layer_a_name_of_vllms_is_of() -> None:
    """Where a layer may keep a state and KV both, vLLM gives one of them a number of its own."""
    pytest.importorskip("torch")
    from thaw.engines.vllm.worker.layout.hybrid import layer_numbers

    plain = layer_numbers({"model_type": "qwen3_5_text"})
    assert plain("language_model.model.layers.11.linear_attn") == 11
    assert plain("model.layers.3.self_attn.attn") == 3
    falcon = layer_numbers({"model_type": "falcon_h1", "num_hidden_layers": 4})
    assert [falcon(name) for name in ("model.layers.2.attn", "model.4.mixer", "model.7.mixer")] == [2, 0, 3]
    blocks = ["mamba", "hybrid", "mamba", "hybrid"]
    zamba = layer_numbers({"model_type": "zamba2", "layers_block_type": blocks})
    assert [zamba(name) for name in ("model.attn.0", "model.attn.1", "2.mixer", "5.mixer")] == [1, 3, 0, 3]
    for numbers, name in ((plain, "4.mixer"), (zamba, "model.attn.2")):
        with pytest.raises(Unsupported, match=f"layer '{name}' has no number"):
            numbers(name)
