"""Sleep and wake on a GPU, by vLLM's or SGLang's own sleep mode: 20 cycles with parked and live sessions, no wrong bit,
the memory freed as the driver says it from outside, and as much in every cycle.

    THAW_GPU_SUITE=sleep python -m pytest tests/gpu/test_sleep_gpu.py

Runs with vLLM from 0.33 on, or with SGLang and its memory saver (`torch_memory_saver`), whichever this environment has.
The card should have no other work: the driver's figures are of all of it. THAW_GPU_TESTS_ON_CPU=1 runs this file where
there is no GPU, to see that it is right; no memory is freed there.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
ENGINE = next((name for name in ("vllm", "sglang") if importlib.util.find_spec(name)), "")
if not ENGINE:
    pytest.skip("neither vLLM nor SGLang here", allow_module_level=True)
ON_CPU = not torch.cuda.is_available()
if ON_CPU and os.environ.get("THAW_GPU_TESTS_ON_CPU") != "1":
    pytest.skip("no GPU here", allow_module_level=True)

import thaw  # noqa: E402
from sleepers import CYCLES, family, turn, undisturbed  # noqa: E402
from thaw.engines import load_engine  # noqa: E402
from thaw.engines.base import Engine  # noqa: E402
from thaw.repo import Repository  # noqa: E402

pytestmark = pytest.mark.gpu

KV_NBYTES = 4 << 30
SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12, "head_dim": 64}
"""0.8 billion parameters: their 1.6 GB are seen among the driver's figures."""
SMALL = {"head_dim": 64}
SHARE = 0.9
"""Of the KV cache and the weights, what must be free while it sleeps."""
FLAT_NBYTES = 64 << 20
"""What free memory may differ by from cycle to cycle."""


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", dtype="bfloat16", **(SMALL if ON_CPU else SHAPE))


def options() -> dict[str, Any]:
    if ENGINE == "vllm":
        usual: dict[str, Any] = {"max_model_len": 4096, "enforce_eager": True, "worker_extension_cls": "junk.Junk"}
        gpu = {"enable_sleep_mode": True, "gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": KV_NBYTES}
    else:
        usual = {"context_length": 4096}
        gpu = {
            "enable_memory_saver": True, "enable_weights_cpu_backup": True, "attention_backend": "triton",
            "sampling_backend": "pytorch", "grammar_backend": "none", "mem_fraction_static": 0.3,
            "cuda_graph_max_bs_decode": 8,
        }  # fmt: skip
    return usual | ({} if ON_CPU else {**gpu, "arena_nbytes": 2 << 30})


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with load_engine(ENGINE, model=str(folder), **options()) as loaded:
        yield loaded


@pytest.fixture
def repo(engine: Engine, tmp_path: Path) -> Iterator[Repository]:
    with thaw.open(tmp_path / "r", engine=engine) as opened:
        yield opened


def free() -> int:
    """Bytes that the driver says are free on the whole card: this process holds none of the engine's."""
    return 0 if ON_CPU else int(torch.cuda.mem_get_info()[0])


def junk(engine: Any) -> None:
    """What a restored session reads must have been written: all pages hold what no model computed."""
    if ENGINE == "vllm":
        engine.collective_rpc("fill_with_junk")


@pytest.mark.parametrize("level", [1, 2])
def test_twenty_sleeps_change_no_bit_and_free_as_much_each_time(
    repo: Repository, engine: Engine, folder: Path, level: int
) -> None:
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    expected, sessions = undisturbed(repo, CYCLES), family(repo)
    asleep, awake = [], []
    for i in range(CYCLES):
        assert turn(sessions, i) == expected[i]
        before = free()
        repo.sleep(level=level)
        asleep.append(free())
        assert repo.wake().missed == ()
        awake.append(free())
        junk(engine)
        if not ON_CPU:
            assert asleep[-1] - before >= SHARE * ((KV_NBYTES if ENGINE == "vllm" else 0) + weights)
            assert abs(awake[-1] - before) <= FLAT_NBYTES, "the engine has its memory again, and no more"
    print(f"said: level {level}: freed {(asleep[-1] - awake[-1]) >> 20} MiB, weights {weights >> 20} MiB")
    assert max(asleep) - min(asleep) <= FLAT_NBYTES and max(awake) - min(awake) <= FLAT_NBYTES
    for one in sessions:
        one.close()


def test_others_may_have_the_memory_meanwhile(repo: Repository) -> None:
    """Whatever they write there, no session reads it."""
    expected, sessions = undisturbed(repo, 2), family(repo)
    assert turn(sessions, 0) == expected[0]
    repo.sleep()
    if not ON_CPU:
        theirs = torch.full((free() // 2,), 0x5A, dtype=torch.uint8, device="cuda")
        assert int(theirs[-1]) == 0x5A
        del theirs
        torch.cuda.empty_cache()
    repo.wake()
    assert turn(sessions, 1) == expected[1]


@pytest.mark.skipif(ENGINE != "vllm", reason="SGLang has no way for a test to write into its slots from outside")
def test_a_cache_that_is_believed_in_after_its_memory_was_lost_is_seen(repo: Repository, engine: Engine) -> None:
    """The control: without the engine's sleep, which empties its table of prefixes, a session finds its old blocks."""
    expected, sessions = undisturbed(repo, 2), family(repo)
    assert turn(sessions, 0) == expected[0]
    junk(engine)
    assert turn(sessions, 1) != expected[1]
