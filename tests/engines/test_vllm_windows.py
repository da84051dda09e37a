"""Windows on vLLM, without vLLM: which layers are a group, what a restored session has, and who sets the flag."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

pytest.importorskip("torch")
pytest.importorskip("transformers")

from thaw.core.cache import SlidingKV
from thaw.core.errors import NotKept, Unsupported
from thaw.engines.hf.config import may_have_windows
from thaw.engines.kind import Wanted
from thaw.engines.served.late_groups import LateGroup, require_kept
from thaw.engines.vllm import support
from thaw.engines.vllm.kind import KIND
from thaw.engines.vllm.settings import KEEPS_WINDOWS, VllmSettings, config_file
from thaw.engines.vllm.worker.layout import LayerGroup, layer_groups

WINDOW = SlidingKV(
    name="sliding", first_layer=0, num_layers=2, num_kv_heads=2, head_dim=16, dtype="bfloat16", window=40
)
FLAG = KEEPS_WINDOWS.replace("_", "-")


def names(*numbers: int) -> list[str]:
    return [f"model.layers.{number}.self_attn.attn" for number in numbers]


def test_layers_of_one_table_and_window_are_a_group() -> None:
    """vLLM names them in any order; the groups are in the order of their first layers, as the transformers engine's."""
    one = layer_groups([names(2, 0, 1, 10)], dict.fromkeys(names(0, 1, 10), 40))
    assert one == (LayerGroup(tuple(names(0, 1, 10)), 0, 40), LayerGroup(tuple(names(2)), 0))
    plain = layer_groups([names(0, 1)], {})
    assert plain == (LayerGroup(tuple(names(0, 1)), 0),)
    two = layer_groups([names(1, 3), names(0, 2)], {})
    assert two == (LayerGroup(tuple(names(0, 2)), 1), LayerGroup(tuple(names(1, 3)), 0))


def test_a_restored_session_goes_on_from_where_its_window_is() -> None:
    late = (LateGroup(WINDOW, 561),)
    for num_kv in (0, 600, 601, 10_000):
        require_kept(late, num_kv)
    for num_kv in (1, 40, 561, 599):
        with pytest.raises(NotKept, match=rf"after {num_kv} tokens the group sliding .* Continue from token 601 or"):
            require_kept(late, num_kv)
    require_kept((), 3)


def test_the_window_of_a_spec_is_that_of_its_layers() -> None:
    assert support.window_of(SimpleNamespace(sliding_window=40)) == 40
    assert support.window_of(SimpleNamespace(sliding_window=None, attention_chunk_size=64)) == 64
    assert support.window_of(SimpleNamespace(sliding_window=None)) is None
    assert support.window_of(SimpleNamespace()) is None


class FullAttentionSpec(SimpleNamespace):
    """As vLLM calls it."""


class SlidingWindowSpec(SimpleNamespace):
    """As vLLM calls it."""


class UniformTypeKVCacheSpecs(SimpleNamespace):
    """As vLLM calls it."""


FULL, SLIDING = (
    FullAttentionSpec(sliding_window=None, head_size=64, head_size_v=64),
    SlidingWindowSpec(sliding_window=40),
)


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        ((FULL,), ""),
        ((FullAttentionSpec(sliding_window=40),), ""),
        ((FULL, SLIDING, SLIDING), f"windows of 40 tokens: vLLM's hybrid KV cache manager .* --{FLAG}"),
        ((FULL, FullAttentionSpec()), r"2 kinds of KV cache \(hybrid\)"),
        ((SLIDING,), "a cache of kind SlidingWindowSpec; full attention, windows beside"),
        (
            (FullAttentionSpec(sliding_window=40, head_size=64, head_size_v=32),),
            "values of 32 numbers beside keys of 64",
        ),
        ((UniformTypeKVCacheSpecs(),), "a cache of kind UniformTypeKVCacheSpecs"),
    ],
)
def test_what_vllm_made_of_windows_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, specs: tuple[Any, ...], says: str
) -> None:
    monkeypatch.setattr(support, "require_config", lambda config: None)
    monkeypatch.setattr(support, "_require_transfer", lambda transfer: None)
    monkeypatch.setattr(support.recurrent, "is_hybrid", lambda config: False)
    monkeypatch.setattr(support.versions, "whole", lambda config: SimpleNamespace(kv_transfer_config=None))
    made = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])
    if not says:
        support.require(None, made)
        return
    with pytest.raises(Unsupported, match=says):
        support.require(None, made)


GEMMA: dict[str, Any] = {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window": 512}
CONFIGS: dict[str, tuple[dict[str, Any], bool]] = {
    "a window beside full attention": (GEMMA, True),
    "of the text part": ({"model_type": "gemma3", "text_config": GEMMA}, True),
    "none": ({"model_type": "llama", "num_hidden_layers": 2}, False),
    "one that is not used": ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 64}, False),
    "of no layer": ({**GEMMA, "layer_types": ["full_attention"] * 6}, False),
    "nonsense": ({**GEMMA, "num_hidden_layers": "six"}, False),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_models_config_says_whether_its_server_is_to_keep_windows(tmp_path: Path, what: str) -> None:
    """`thaw up` writes the flag into the server's file, and for no other model."""
    config, windows = CONFIGS[what]
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    assert may_have_windows(str(tmp_path)) is windows
    wanted = Wanted(str(tmp_path), "127.0.0.1", 1, "python", tmp_path, {})
    start = KIND.server.start(wanted)
    said = yaml.safe_load(Path(start.config).read_text("utf-8"))
    assert said.get(FLAG, False) is windows


def test_a_model_that_is_nowhere_has_no_windows(tmp_path: Path) -> None:
    assert not may_have_windows(str(tmp_path)) and not may_have_windows("nobody/has-this") and not may_have_windows("?")


def test_the_file_for_no_particular_model_names_the_flag_in_words() -> None:
    text = config_file(VllmSettings(mail="m"))
    assert f"{FLAG}: true" in text and FLAG not in yaml.safe_load(text)
    assert yaml.safe_load(config_file(VllmSettings(mail="m"), windows=True))[FLAG] is True
