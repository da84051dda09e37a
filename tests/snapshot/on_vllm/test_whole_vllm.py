"""vLLM with all its sessions is cut while it works, killed, and restored in a fresh process: nobody notices.

In float32 and on one core: there vLLM's bits do not depend on which requests share a step, so a run is compared with an
undisturbed one whatever was admitted in which step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from whole_engine import HELD, goes_on

pytest.importorskip("vllm")

OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 64}
PROMPT = "The river is long and slow, and nobody knows its name."


@pytest.mark.soak(
    "boots two engines, 32 sessions at a time",
    receipt="vllm-whole-engine",
    covers=(
        "src/thaw/snapshot",
        "src/thaw/engines/vllm",
        "src/thaw/engines/served",
        "src/thaw/data",
        "tests/snapshot/whole_engine.py",
        "tests/snapshot/snapshot_worker.py",
    ),
)
@pytest.mark.timeout(3600)
def test_32_decoding_8_waiting_and_4_parked_go_on_on_vllm(
    demo_model: Path, tmp_path: Path, soak_receipt: Callable[..., None]
) -> None:
    plan = {
        "engine": "vllm", "options": {**OPTIONS, "model": str(demo_model)}, "slow": {}, "prompt": PROMPT,
        "max_num_seqs": 32, "num_requests": 40, "num_parked": 4, "max_tokens": 40, "at": 4, "after_s": 0.0,
    }  # fmt: skip
    counted = goes_on(plan, tmp_path)
    print(counted)
    soak_receipt(
        what="SmolLM2-135M on vLLM, float32, one core: 32 sessions decoding, 8 waiting, 4 parked; a snapshot while "
        "they decoded, kill -9, a restore in a fresh process",
        held=HELD,
        **counted,
    )
