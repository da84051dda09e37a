"""Recurrent models on vLLM, asked for on a GPU: what is refused by name, and what tests there are let past. No vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from thaw.core.errors import Unsupported
from thaw.engines.hf.recurrent import has_delta_rule
from thaw.engines.vllm import recurrent, versions
from thaw.engines.vllm.worker.layout import require_whole_blocks


@pytest.fixture(autouse=True)
def new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "names_failed_loads", lambda: True)
    monkeypatch.setattr(versions, "whole", lambda config: config)
    for name in (recurrent.UNTRIED, recurrent.CONV_LAYOUT):
        monkeypatch.delenv(name, raising=False)


def asked(kind: str = "qwen3_next", device: str = "cuda", *, v2: bool = False, **changes: Any) -> None:
    cache = {"mamba_cache_mode": "align", "mamba_ssm_cache_dtype": "float32", "mamba_cache_dtype": "auto"}
    recurrent.require(
        SimpleNamespace(
            model_config=SimpleNamespace(
                hf_text_config=SimpleNamespace(model_type=kind, num_mem_blocks=changes.pop("num_mem_blocks", 1))
            ),
            cache_config=SimpleNamespace(**{**cache, **changes}),
            device_config=SimpleNamespace(device_type=device),
            scheduler_config=SimpleNamespace(async_scheduling=changes.get("async_scheduling", False)),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
            kv_transfer_config=None,
            use_v2_model_runner=v2,
        )
    )


def test_what_was_run_on_a_gpu_is_supported_there_and_tests_are_let_past_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked()
    asked(v2=True)
    asked("lfm2_moe")
    for kind in ("qwen3_5_text", "lfm2"):
        asked(kind)
        asked(kind, v2=True)
    asked("zamba2", mamba_cache_mode="none")
    for kind in ("granitemoehybrid", "falcon_h1", "nemotron_h"):
        asked(kind, mamba_cache_mode="none")
        asked(kind, v2=True, mamba_cache_mode="none")
    untried: list[tuple[str, str, dict[str, Any]]] = [
        ("V1 runner alone, not on V2", "lfm2_moe", {"v2": True}),
        ("V1 runner alone, not on V2", "qwen3_next", {"v2": True, "device": "cpu"}),
        ("mamba_cache_mode align, not none; start vLLM with its prefix", "qwen3_next", {"mamba_cache_mode": "none"}),
        ("mamba_cache_mode none, not align; start vLLM without its prefix", "granitemoehybrid", {}),
        ("NVIDIA's GPUs alone, not on xpu", "qwen3_next", {"device": "xpu"}),
    ]
    for said in (None, "0", ""):
        if said is not None:
            monkeypatch.setenv(recurrent.UNTRIED, said)
        for why, kind, changes in untried:
            with pytest.raises(Unsupported, match=why):
                asked(kind, **changes)
    monkeypatch.setenv(recurrent.UNTRIED, "1")
    for _, kind, changes in untried:
        if changes.get("device") != "cpu":
            asked(kind, **changes)
    with pytest.raises(Unsupported, match="V1 runner alone"):
        asked(device="cpu", v2=True)


def test_what_they_are_not_let_past(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(recurrent.UNTRIED, "1")
    with pytest.raises(Unsupported, match="--no-async-scheduling"):
        asked(async_scheduling=True)
    with pytest.raises(Unsupported, match="mamba_ssm_cache_dtype=auto is the model"):
        asked(mamba_ssm_cache_dtype="auto")
    asked("lfm2", mamba_ssm_cache_dtype="auto")
    with pytest.raises(Unsupported, match="mamba_ssm_cache_dtype=bfloat16"):
        asked(mamba_ssm_cache_dtype="bfloat16")


def test_a_mode_that_vllm_has_on_a_gpu_alone_stays_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(recurrent.UNTRIED, "1")
    with pytest.raises(Unsupported, match="mamba_cache_mode none, not align"):
        asked("granitemoehybrid", "cpu")


def test_channels_first_is_refused_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM then writes a convolution's state in another order, which no tensor's shape tells."""
    monkeypatch.setenv(recurrent.CONV_LAYOUT, "SD")
    asked(device="cpu")
    monkeypatch.setenv(recurrent.CONV_LAYOUT, "DS")
    with pytest.raises(Unsupported, match=r"VLLM_SSM_CONV_STATE_LAYOUT=DS: .* unset it"):
        asked(device="cpu")


def test_blocks_that_the_attention_takes_in_pieces_are_refused() -> None:
    layout: Any = SimpleNamespace(block_size=64)
    require_whole_blocks([layout], [SimpleNamespace(block_size=64)])
    with pytest.raises(Unsupported, match=r"blocks of 128 tokens .* pieces of 64: .*--block-size 64"):
        require_whole_blocks([layout], [SimpleNamespace(block_size=128)])


def test_only_a_delta_rules_matrices_lie_the_other_way_round_on_a_gpu() -> None:
    found = {kind for kind in recurrent.MODES if has_delta_rule({"model_type": kind})}
    assert found == {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"}


def test_shared_attention_of_several_blocks_is_refused() -> None:
    """vLLM numbers its KV block by block, not layer by layer."""
    asked("zamba2", "cpu", mamba_cache_mode="none", num_mem_blocks=1)
    with pytest.raises(Unsupported, match=r"2 blocks of shared attention \(num_mem_blocks\)"):
        asked("zamba2", "cpu", mamba_cache_mode="none", num_mem_blocks=2)


def test_a_type_that_was_run_on_a_cpu_alone_is_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    (kind,) = recurrent.MODES.keys() - recurrent.ON_A_GPU.keys()
    asked(kind, "cpu", mamba_cache_mode="none")
    with pytest.raises(Unsupported, match=f"{kind}.* on a CPU alone; on a GPU these were: falcon_h1, granitemoehybrid"):
        asked(kind, mamba_cache_mode="none")
    monkeypatch.setenv(recurrent.UNTRIED, "1")
    asked(kind)
