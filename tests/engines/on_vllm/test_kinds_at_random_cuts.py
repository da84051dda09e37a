"""Every kind of cache that vLLM runs on a CPU, cut anywhere: a session that was written by one engine goes on in
another process, bit for bit as its parent does. The cuts are at random tokens, at the ends of vLLM's blocks, and in the
middle of an answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from multimodal import SHAPES as MULTIMODAL
from vllm_models import make_for_vllm, options_of
from vllm_shapes import SHAPES as SHAPED

from thaw.core.cache import point_groups
from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.engines.vllm import versions
from thaw.testing.laws.kit import Lab, greedy, same, seeded
from thaw.testing.models import make_random_model
from thaw.testing.plans import mount_at

if not versions.names_failed_loads():
    pytest.skip("releases before 0.32 have full attention alone", allow_module_level=True)

SHAPES = ("llama", "deepseek_v3", *SHAPED, *MULTIMODAL)
WITHOUT_PREFIX_CACHE = ("granitemoehybrid", "nemotron_h", "falcon_h1", "zamba2")
LONGEST = 700
NUM_CUTS = 20
AMID = (30, 250)
"""Tokens of the prompts whose answers are cut."""


@pytest.mark.soak("two engines of each of more than ten shapes", receipt="vllm-kinds-at-random-cuts")
@pytest.mark.parametrize("arch", SHAPES)
def test_a_cut_anywhere_goes_on_in_another_process_with_the_parents_bits(arch: str, tmp_path: Path) -> None:
    boot = _boots(arch, tmp_path)
    lab = Lab(mount_at(tmp_path / "packs"))
    with boot() as here, boot() as there:
        for count in cuts(arch, int(here.info.numerics["block_size"])):
            session = lab.begin(here, count, start=count)
            plan = lab.plan(lab.capture(here, session))
            restored = lab.hydrate(there, plan)
            assert restored.proof.num_cached_tokens == plan.num_kv == count - 1
            for sampling in (seeded(5), greedy(5)):
                one, two = lab.twin(here, session), lab.twin(there, restored.session)
                whole = lab.one(here, one, sampling)
                rest = lab.one(there, two, sampling)
                same(whole, rest)
                assert rest.usage.num_prefilled_tokens == 1, (arch, count)
                here.close_session(one)
                there.close_session(two)
            here.close_session(session)
            there.close_session(restored.session)
        for count in AMID:
            captured, whole = lab.captured_amid(here, lab.begin(here, count))
            same(whole, lab.resume(there, lab.hydrate(there, lab.plan(captured)).session)[0])
        if point_groups(here.info.groups):
            assert here.stats()["state_copies"] >= NUM_CUTS, "a state was kept at each cut"


def _boots(arch: str, tmp_path: Path) -> Callable[[], Engine]:
    folder = tmp_path / arch
    if arch == "llama":
        make_random_model(arch, folder, dtype="bfloat16", head_dim=32)
    else:
        make_for_vllm(arch, folder)
    caching = {"enable_prefix_caching": False} if arch in WITHOUT_PREFIX_CACHE else {}
    return lambda: load_engine("vllm", model=str(folder), **options_of(arch, num_gpu_blocks_override=400, **caching))


def cuts(arch: str, block: int) -> list[int]:
    """Tokens of a session: its last one has no KV yet, so it is one more than the cut."""
    edges = [edge for blocks in (1, 2) for edge in (blocks * block - 1, blocks * block, blocks * block + 1)]
    drawn = random.Random(arch).sample(range(2, LONGEST), NUM_CUTS)
    return sorted({cut + 1 for cut in (*drawn, *edges)})
