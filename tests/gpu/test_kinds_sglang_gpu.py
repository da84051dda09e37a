"""Other kinds of cache in an SGLang on a GPU: latents and windows, each on a small random model.

The laws are those of the CPU's tests (`tests/engines/on_sglang/test_kinds_sglang.py`), run here on engines of this
file: Triton's attention, CUDA graphs and overlap scheduling, bfloat16. Slots that hold nothing of a window are filled
with junk by the same plug-in. THAW_GPU_TESTS_ON_CPU=1 runs this file where there is no GPU, to see that it is right.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang")
ON_CPU = not torch.cuda.is_available()
if ON_CPU and os.environ.get("THAW_GPU_TESTS_ON_CPU") != "1":
    pytest.skip("no GPU here", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "engines" / "on_sglang"))

import test_kinds_sglang as of_kinds  # noqa: E402
from test_kinds_sglang import (  # noqa: E402, F401 - collected here, with the fixtures of this file
    faults,
    lab,
    test_a_cut_anywhere_goes_on_like_the_uninterrupted_parent,
    test_a_cut_in_the_middle_of_generating_goes_on_like_the_uninterrupted_parent,
    test_a_live_session_goes_on_from_any_token_and_a_restored_one_from_those_it_has,
    test_a_snapshot_crosses_to_transformers_and_back,
    test_children_of_a_restored_session_need_one_load,
    test_controls_that_can_see,
    test_nothing_leaks,
    test_twenty_turns_write_their_own_tokens_and_the_last_goes_on_like_its_parent,
    test_what_was_restored_is_found_by_nobody_else,
)

from kind_models import KINDS as WHAT  # noqa: E402
from kind_models import make_kind_model  # noqa: E402
from thaw.engines import load_engine  # noqa: E402
from thaw.engines.hf.config import load_config  # noqa: E402
from thaw.engines.hf.groups import groups  # noqa: E402
from thaw.engines.sglang.client.engine import SglangEngine  # noqa: E402

pytestmark = pytest.mark.gpu
PLUG_IN = importlib.import_module("faults")
"""The module: `faults` is its fixture here."""

SHAPES: dict[str, dict[str, Any]] = {
    "minicpm3": {"kv_lora_rank": 256, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64, "head_dim": 96},
    "mellum": {"head_dim": 64},
    "deepseek_v3": {
        "moe_layer_freq": 1, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "head_dim": 64,
        "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 64, "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
    "gemma3_text": {"head_dim": 64, "query_pre_attn_scalar": 1024},
    "gpt_oss": {
        "head_dim": 64, "hidden_size": 128, "intermediate_size": 128,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}  # fmt: skip
"""Head sizes that kernels on a GPU take. The first two are those that a CPU runs, too."""
ROOM: dict[str, object] = {
    "dtype": "bfloat16", "max_model_len": 3300, "max_total_tokens": 16_384, "page_size": of_kinds.PAGE,
    "chunked_prefill_size": 2048, "attention_backend": "triton", "sampling_backend": "pytorch",
    "grammar_backend": "none", "mem_fraction_static": 0.5, "cuda_graph_max_bs_decode": 8, "arena_nbytes": 1 << 30,
}  # fmt: skip
"""As `test_engine_sglang_gpu`, in pages of 16 tokens. The tokens are what bounds its memory."""
if ON_CPU:
    ROOM = {**of_kinds.ROOM, "dtype": "bfloat16"}
    SHAPES = {"minicpm3": {}, "mellum": {}}
of_kinds.ROOM = ROOM
of_kinds.KINDS = {kind: WHAT[kind] for kind in SHAPES}
of_kinds.POWER = 1.4
"""In bfloat16 the noise of a batch's shape is large; both are printed."""
of_kinds.POWER_OF_ONE = 0
"""One wrong token of 350 moves about as much as that noise there. It has to move something: the right cache, put back,
moves nothing."""


@pytest.fixture(scope="module", params=SHAPES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = {"dtype": "bfloat16", **SHAPES[kind]}
    made = tmp_path_factory.mktemp("made") / kind
    if kind in of_kinds.TIED:
        return of_kinds.tied(tiny_model(kind, tie_word_embeddings=True, **more), made, of_kinds.TIED[kind])
    return make_kind_model(kind, made, **more)


@pytest.fixture(scope="module")
def engine(folder: Path, faults: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangEngine]:  # noqa: F811 - the fixture
    with pytest.MonkeyPatch.context() as patch:
        for name, value in faults.environment.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", PLUG_IN.install(tmp_path_factory.mktemp("plug-in")))
        loaded = load_engine("sglang", model=str(folder), **ROOM)
    assert isinstance(loaded, SglangEngine)
    with loaded, faults.on("junk", 0):
        yield loaded


def test_its_groups_are_those_of_the_config(engine: SglangEngine, folder: Path) -> None:
    print("said:", engine.info.groups, engine.info.numerics)
    found = groups(load_config(folder).get_text_config().to_dict(), "bfloat16")
    assert found and engine.info.groups == found == engine.identity().groups
    assert engine.info.device.startswith("cpu" if ON_CPU else "cuda")
