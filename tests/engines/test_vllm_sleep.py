"""Which vLLM sleeps safely, and what one that does not is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from thaw.engines.served.protocol import EngineFacts
from thaw.engines.vllm import versions
from thaw.engines.vllm.client.engine import VllmEngine
from thaw.engines.vllm.scheduler.content_ids import BlockContents


def config(device: str, sleeps: bool, lora: object = None) -> SimpleNamespace:
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type=device),
        model_config=SimpleNamespace(enable_sleep_mode=sleeps),
        lora_config=lora,
    )


@pytest.mark.parametrize(
    ("device", "sleeps", "version", "levels"),
    [
        ("cpu", False, "0.26.0", (1, 2)),
        ("cuda", True, "0.26.0", ()),
        ("cuda", True, "0.32.0", ()),
        ("cuda", True, "0.33.0", (1, 2)),
        ("cuda", True, "0.34.0rc1", (1, 2)),
        ("cuda", False, "0.33.0", ()),
        ("cuda", True, "nightly", ()),
    ],
)
def test_on_a_gpu_only_a_release_that_tells_its_connectors_sleeps(
    device: str, sleeps: bool, version: str, levels: tuple[int, ...]
) -> None:
    assert versions.sleep_levels(config(device, sleeps), version) == levels


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_adapters_are_not_dropped_for_nobody_reads_them_again(device: str) -> None:
    assert versions.sleep_levels(config(device, True, lora=object()), "0.33.0") == (1,)


def facts(version: str, **more: Any) -> EngineFacts:
    return EngineFacts(
        protocol=1, thaw="1", version=version, pid=1, model="m", dtype="float32", max_model_len=1, max_logprobs=1,
        block_size=1, num_blocks=1, world_size=1, prefix_caching=True, runner="V1", vocab_size=1, eos_token_ids=(),
        **more,
    )  # fmt: skip


def test_a_refusal_says_what_to_do() -> None:
    assert "from 0.33 on" in VllmEngine.no_sleep(facts("0.32.0"), 1)
    assert "--enable-sleep-mode" in VllmEngine.no_sleep(facts("0.33.0"), 1)
    assert "with level 1" in VllmEngine.no_sleep(facts("0.33.0", sleep_levels=(1,), max_adapters=1), 2)


@pytest.mark.parametrize(("cached", "left"), [(None, 0), (b"hash", 1)])
def test_no_block_is_believed_in_once_vllms_table_is_empty(cached: bytes | None, left: int) -> None:
    """The control: while vLLM still finds a block, what lies in it stays known."""
    contents = BlockContents()
    contents._in_block = {0: 7}
    contents.pool = SimpleNamespace(blocks=[SimpleNamespace(block_hash=cached)])
    contents.forget_uncached()
    assert len(contents._in_block) == left
