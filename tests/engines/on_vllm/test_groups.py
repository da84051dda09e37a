"""Several KV cache groups in a real vLLM: each has block tables of its own, in pages that all groups share.

The model is a plain one whose layers are given to vLLM as two groups; no model that thaw runs has several, and one that
had them would be refused at boot (`support.require`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import thaw
from thaw.core.cache import token_groups
from thaw.engines.base import Engine
from thaw.testing import ExactnessTests
from thaw.testing.laws.groups_law import GroupsLaw
from thaw.testing.laws.kit import Lab, bits, greedy
from thaw.testing.laws.proof_law import ProofLaw

vllm = pytest.importorskip("vllm")
if tuple(int(part) for part in vllm.__version__.split(".")[:2]) < (0, 32):
    pytest.skip("older releases were not tried with two groups of one kind", allow_module_level=True)

from thaw.engines.served.settings import settled  # noqa: E402
from thaw.engines.vllm import support  # noqa: E402
from thaw.engines.vllm.settings import VllmSettings, engine_args  # noqa: E402


def in_two(real: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's own groups, each cut in two."""

    def groups(config: Any, specs: Any) -> Any:
        from vllm.v1.kv_cache_interface import KVCacheGroupSpec

        (one,) = real(config, specs)
        half = len(one.layer_names) // 2
        return [
            KVCacheGroupSpec(names, one.kv_cache_spec) for names in (one.layer_names[:half], one.layer_names[half:])
        ]

    return groups


@pytest.fixture(scope="module")
def two_groups(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    from vllm import LLM
    from vllm.v1.core import kv_cache_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setattr(kv_cache_utils, "get_kv_cache_groups", in_two(kv_cache_utils.get_kv_cache_groups))
        patch.setattr(support, "require", lambda config, kv_cache_config: support.require_config(config))
        model = tiny_model("llama", dtype="bfloat16", head_dim=64)
        llm = LLM(str(model), enforce_eager=True, max_model_len=4096, **engine_args(settled(VllmSettings())))
    with thaw.attach(llm) as attached:
        yield attached
    llm.llm_engine.engine_core.shutdown()


class TestTwoGroups(ExactnessTests, GroupsLaw, ProofLaw):
    """`other` is the same engine: what comes back from packs lies in blocks of its own there, too."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, two_groups: Engine) -> Engine:
        return two_groups

    @pytest.fixture(scope="class")
    @classmethod
    def other(cls, two_groups: Engine) -> Engine:
        return two_groups

    def test_both_groups_are_named(self, engine: Engine) -> None:
        named = [str(group).split(",")[0] for group in engine.info.groups]
        assert named == ["full: layers 0..0", "full.1: layers 1..2"]
        assert engine.identity().groups == engine.info.groups

    def test_negative_control_one_groups_kv_of_another_session_changes_the_logprobs(
        self, engine: Engine, lab: Lab
    ) -> None:
        session, other = lab.begin(engine, 300), lab.begin(engine, 300, start=7)
        plan, strange = (lab.plan(lab.capture(engine, one)) for one in (session, other))
        right = lab.one(engine, session, greedy(4), (5,))
        for group in token_groups(engine.info.groups):
            slices = tuple(
                msgspec.structs.replace(mine, blobs={**mine.blobs, group.name: theirs.blobs[group.name]})
                for mine, theirs in zip(plan.slices, strange.slices, strict=True)
            )
            mixed = lab.hydrate(engine, msgspec.structs.replace(plan, slices=slices)).session
            assert bits(right.logprobs)[0] != bits(lab.one(engine, mixed, greedy(4), (5,)).logprobs)[0], group.name
