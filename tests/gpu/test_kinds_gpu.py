"""Other kinds of cache in a vLLM on a GPU: latents, windows and recurrent states, each on small random models.

Sessions are restored by a second engine, whose processes never saw them and whose pages hold junk. Laws that a CPU's
tests have (`tests/engines/on_vllm/test_kinds_*.py`) are theirs, run here on engines of this file. Of models with
recurrent layers, what was not run whole is refused on a GPU; THAW_UNTRIED_KINDS=1 lets these tests past that, and
without it they are skipped.

Noise is that of bfloat16 and of kernels whose order of sums depends on the batch: controls are compared with it, and
both are printed. THAW_GPU_GRAPHS=1 runs decode steps in CUDA graphs, which are captured without torch.compile.
THAW_GPU_TESTS_ON_CPU=1 runs this file where there is no GPU, to see that the file itself is right.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

torch = pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")
ON_CPU = not torch.cuda.is_available()
if ON_CPU and os.environ.get("THAW_GPU_TESTS_ON_CPU") != "1":
    pytest.skip("no GPU here", allow_module_level=True)

for folder in ("engines/on_vllm", "gpu"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

import test_kinds_recurrent as of_states  # noqa: E402
from test_kinds_recurrent import (  # noqa: E402, F401 - collected here, with the fixtures of this file
    test_a_hit_that_is_not_the_sessions_own_is_never_extended,
    test_a_live_session_of_twenty_turns_reads_new_tokens_alone,
    test_a_load_that_fails_ends_its_own_request_alone,
    test_a_pin_holds_a_sessions_full_blocks,
    test_a_state_that_was_asked_for_at_a_prompts_end_comes_when_the_session_goes_on,
    test_a_token_that_is_no_point_is_read_again_from_the_nearest_one,
    test_an_answer_that_is_captured_while_it_runs_goes_on_with_its_bits,
    test_children_of_one_point_are_one_another_and_the_parent,
    test_controls_that_can_see,
    test_points_asked_for_ahead_are_those_of_a_parent_that_stopped_there,
    test_points_of_a_prompt_that_is_answered_and_of_its_answer_are_passed_by,
    test_siblings_share_the_full_blocks_of_their_point,
    test_snapshots_cross_to_transformers_and_back,
    test_what_was_stored_anywhere_goes_on_with_the_parents_bits,
    test_where_no_state_is_kept_the_refusal_names_those_that_are,
)
from test_kinds_windows import mixed, sliding  # noqa: E402
from vllm_models import require_vision  # noqa: E402
from vllm_shapes import LATENT as CPU_LATENT  # noqa: E402
from vllm_shapes import RECURRENT, V3, WINDOWS, make_shaped  # noqa: E402

from kind_models import WINDOW, make_kind_model  # noqa: E402
from thaw.core.cache import LatentKV, token_groups  # noqa: E402
from thaw.core.errors import NotKept  # noqa: E402
from thaw.engines import load_engine  # noqa: E402
from thaw.engines.base import Engine, HydratePlan, SessionRef  # noqa: E402
from thaw.engines.vllm import recurrent  # noqa: E402
from thaw.engines.vllm.client.engine import VllmEngine  # noqa: E402
from thaw.testing.laws.bytes_law import blob_ids, kv_nbytes  # noqa: E402
from thaw.testing.laws.crossing_law import largest, top  # noqa: E402
from thaw.testing.laws.kit import Lab, every_knob, greedy, ids, same, seeded, until  # noqa: E402
from thaw.testing.plans import halves_swapped, mount_at, tampered  # noqa: E402

pytestmark = pytest.mark.gpu

LATENT: dict[str, Any] = {
    **CPU_LATENT, **V3, "num_attention_heads": 16, "num_key_value_heads": 16, "qk_nope_head_dim": 128,
    "v_head_dim": 128, "q_lora_rank": 64,
}  # fmt: skip
"""Attention as wide as DeepSeek V3's: its kernels on a GPU take no other."""
KINDS: dict[str, dict[str, Any]] = {
    "deepseek_v3": LATENT,
    "gemma3_text": WINDOWS["gemma3_text"],
    "gpt_oss": {**WINDOWS["gpt_oss"], "hidden_size": 128, "intermediate_size": 128},
    "olmo3": {**WINDOWS["olmo3"], "head_dim": 64},
}
GDN = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
GDNS = ("qwen3_next", "qwen3_5_text")
for arch, more in (("qwen3_next", GDN), ("qwen3_5_text", GDN), ("granitemoehybrid", {"mamba_d_state": 16})):
    RECURRENT[arch].update(more)  # in place: those of `make_shaped`
of_states.NOISE_FACTOR = 2
STATEFUL = {
    "gdn": ("qwen3_next", True, True),
    "gdn-without-prefix-cache": ("qwen3_next", False, True),
    "short-convolution": ("lfm2", True, True),
    "mamba2": ("granitemoehybrid", False, True),
    "mamba2-with-prefix-cache": ("granitemoehybrid", True, True),
    "text-gdn": ("qwen3_5_text", True, True),
    "experts-short-convolution": ("lfm2_moe", True, True),
    "plain-layers-mamba2": ("nemotron_h", False, True),
    "attention-in-each-mamba2": ("falcon_h1", False, True),
    "shared-attention-mamba2": ("zamba2", False, True),
}
"""As `how` in the tests of states: a model, whether vLLM's prefix cache is on, and that another engine restores."""
REFUSED = [STATEFUL["gdn-without-prefix-cache"], STATEFUL["mamba2-with-prefix-cache"]]
"""What thaw refuses on a GPU."""
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
POWER = 2
"""How many times more than the noise of a batch's shape a control must move a log probability."""
CUTS = sorted(
    {2, 15, 16, 17, 31, 33, WINDOW - 1, WINDOW, WINDOW + 1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 433, 700}
)


def options(**more: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "max_model_len": 2048, "gpu_memory_utilization": 0.08, "kv_cache_memory_bytes": 1 << 30,
        "arena_nbytes": 1 << 30, "max_num_batched_tokens": 2048, "max_num_seqs": 64,
        "worker_extension_cls": "junk.Junk",
    }  # fmt: skip
    if ON_CPU:
        usual = {"max_model_len": 2048, "worker_extension_cls": "junk.Junk"}
    how = {"compilation_config": GRAPHS} if os.environ.get("THAW_GPU_GRAPHS") == "1" else {"enforce_eager": True}
    return usual | how | more


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


# --- models with recurrent layers: `how`, `engine` and `other` are what their laws ask for


@pytest.fixture(scope="module", params=list(STATEFUL.values()), ids=list(STATEFUL))
def how(request: pytest.FixtureRequest) -> tuple[str, bool, bool]:
    if not ON_CPU and request.param in REFUSED and os.environ.get(recurrent.UNTRIED) != "1":
        pytest.skip(f"refused on a GPU; {recurrent.UNTRIED}=1 runs it")
    return cast("tuple[str, bool, bool]", request.param)


@pytest.fixture(scope="module")
def folder(how: tuple[str, bool, bool], tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_vision(how[0])
    return make_shaped(how[0], tmp_path_factory.mktemp("made") / how[0], dtype="bfloat16")


@pytest.fixture(scope="module")
def boot(how: tuple[str, bool, bool], folder: Path) -> Callable[..., Engine]:
    arch, caches, _ = how
    blocks = 120 if ON_CPU or arch in GDNS else 2000  # of 16 tokens
    more: dict[str, Any] = dict(enable_prefix_caching=caches, async_scheduling=False, num_gpu_blocks_override=blocks)
    if arch in GDNS:
        more["additional_config"] = {"gdn_prefill_backend": "triton"}  # the other one stores checkpoints of its own
    if arch not in recurrent.NO_MATRICES:
        more["mamba_ssm_cache_dtype"] = "float32"
    return lambda **changes: load_engine("vllm", model=str(folder), **options(**more, **changes))


@pytest.fixture(scope="module")
def engine(boot: Callable[..., Engine]) -> Iterator[Engine]:
    with boot() as loaded:
        block = int(loaded.info.numerics["block_size"])
        of_states.ENDS = tuple(sorted({37, 300, 700, block - 1, block, block + 1, 2 * block}))
        yield loaded


@pytest.fixture
def shared_block(how: tuple[str, bool, bool], engine: Engine) -> int:
    if not how[1]:
        pytest.skip("vLLM has no prefix cache here")
    return int(engine.info.numerics["block_size"])


@pytest.fixture(scope="module")
def other(boot: Callable[..., Engine], engine: Engine) -> Iterator[Engine]:
    with boot() as loaded:
        yield loaded


def test_what_vllm_says_of_its_pages(engine: Engine) -> None:
    print("said:", engine.info.groups, engine.info.numerics)
    assert "recurrent" in str(engine.info.groups) or "conv" in str(engine.info.groups)


# --- models whose layers keep tokens


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kind_model(kind, tmp_path_factory.mktemp("kinds") / kind, dtype="bfloat16", **KINDS[kind])


@pytest.fixture(scope="module")
def here(model: Path) -> Iterator[VllmEngine]:
    with load_engine("vllm", model=str(model), **options()) as loaded:
        assert isinstance(loaded, VllmEngine)
        yield loaded


@pytest.fixture(scope="module")
def second(model: Path, here: VllmEngine) -> Iterator[VllmEngine]:
    with load_engine("vllm", model=str(model), **options()) as loaded:
        assert isinstance(loaded, VllmEngine)
        yield loaded


@pytest.fixture
def there(second: VllmEngine) -> VllmEngine:
    """Another process, and junk in all its pages."""
    fill_with_junk(second)
    return second


def fill_with_junk(engine: VllmEngine) -> None:
    """vLLM knows of no block any more, and each holds what no model computed."""
    llm: Any = engine._transport._llm  # type: ignore[attr-defined]
    until(lambda: bool(engine._loop.wait(llm.reset_prefix_cache())), limit_s=20.0)
    assert all(nbytes > 0 for nbytes in engine.collective_rpc("fill_with_junk"))


def test_its_groups_are_those_of_the_config(kind: str, here: VllmEngine) -> None:
    groups = here.info.groups
    print("said:", groups, here.info.numerics)
    assert here.identity().groups == groups
    if kind == "deepseek_v3":
        assert groups == (LatentKV(name="latent", first_layer=0, num_layers=3, width=576, dtype="bfloat16"),)
    else:
        assert sliding(here).window == WINDOW


def test_a_cut_anywhere_goes_on_like_the_uninterrupted_parent(here: VllmEngine, there: VllmEngine, lab: Lab) -> None:
    """Every cut is tried, so that a failure names all that are wrong."""
    wrong = {}
    for count in CUTS:
        session = lab.begin(here, count, start=count)
        plan = lab.plan(lab.capture(here, session))
        whole = lab.one(here, session, seeded(6), (5,))
        fill_with_junk(there)
        restored = lab.hydrate(there, plan)
        assert restored.proof.num_cached_tokens == plan.num_kv == count - 1
        out = lab.one(there, restored.session, seeded(6), (5,))
        if out.token_ids != whole.token_ids or out.logprobs != whole.logprobs:
            wrong[count] = max(abs(a - b) for a, b in zip(out.logprobs, whole.logprobs, strict=True))
        assert (out.num_cached_tokens, out.usage.num_prefilled_tokens) == (count - 1, 2), count
        here.close_session(session)
        there.close_session(restored.session)
    assert wrong == {}


def test_a_cut_in_the_middle_of_generating_goes_on_like_the_uninterrupted_parent(
    here: VllmEngine, there: VllmEngine, lab: Lab
) -> None:
    for count in (WINDOW - 10, 250):
        captured, whole = lab.captured_amid(here, lab.begin(here, count))
        same(whole, lab.resume(there, lab.hydrate(there, lab.plan(captured)).session)[0])


def test_twenty_turns_write_their_own_tokens_and_the_last_goes_on_like_its_parent(
    here: VllmEngine, there: VllmEngine, lab: Lab
) -> None:
    session = lab.begin(here, 250)
    captures = [lab.capture(here, session)]
    for turn in range(20):
        lab.one(here, session, every_knob() if turn % 2 else seeded(3), ids(4, 9 + turn))
        captures.append(lab.capture(here, session, captures[-1].num_kv))
    plan = lab.plan(captures[-1], *captures[:-1])
    same(lab.one(here, session, seeded(8)), lab.one(there, lab.hydrate(there, plan).session, seeded(8)))


def test_a_live_session_is_forked_at_any_token(here: VllmEngine, there: VllmEngine, lab: Lab) -> None:
    session = lab.begin(here, 600, start=3)
    for at in (2, WINDOW, 130, 257, 599):
        one, two = (lab.one(here, lab.twin(here, session, at), seeded(4), (5,)) for _ in range(2))
        same(one, two)
        moved = lab.move(here, lab.twin(here, session, at), there)
        same(one, lab.one(there, moved, seeded(4), (5,)))


def test_children_in_one_batch_are_those_of_the_restored_session(here: VllmEngine, there: VllmEngine, lab: Lab) -> None:
    session = lab.begin(here, 1001)
    moved = lab.move(here, session, there)
    mine = lab.run(here, *lab.fork(here, session, 4), sampling=seeded(6))
    theirs = lab.run(there, *lab.fork(there, moved, 4), sampling=seeded(6))
    for one, two in zip(mine, theirs, strict=True):
        same(one, two)


@pytest.mark.parametrize("count", [1, WINDOW, WINDOW + 1, 129, 700])
def test_restored_bytes_equal_captured_bytes(here: VllmEngine, there: VllmEngine, lab: Lab, count: int) -> None:
    first = lab.capture(here, lab.begin(here, count))
    again = lab.capture(there, lab.hydrate(there, lab.plan(first)).session)
    assert blob_ids(again) == blob_ids(first) and kv_nbytes(again) == kv_nbytes(first)


def test_a_restored_session_is_forked_where_its_window_is_and_refused_by_name_elsewhere(
    kind: str, here: VllmEngine, there: VllmEngine, lab: Lab
) -> None:
    plan = lab.plan(lab.capture(here, lab.begin(here, 600)))
    restored = lab.hydrate(there, plan).session
    if kind == "deepseek_v3":
        lab.one(there, lab.twin(there, restored, 100), seeded(4), (5,))
        return
    for at in (100, 300, plan.num_kv - 1):
        with pytest.raises(NotKept, match=f"after {at - 1} tokens the group {sliding(there).name}"):
            lab.fork(there, restored, at=at)


def test_wrong_caches_are_seen(kind: str, here: VllmEngine, there: VllmEngine, lab: Lab) -> None:
    """Controls: another session's group, halves exchanged, of latents the roped part in another order. What is right
    has the parent's bits; what is wrong lies farther off than a batch of another shape does."""
    session, stranger = lab.begin(here, 300), lab.begin(here, 300, start=7)
    plan, strange = (lab.plan(lab.capture(here, one)) for one in (session, stranger))
    asked = greedy(1, logprobs=20)

    def after(made: HydratePlan) -> dict[int, float]:
        return top(lab.one(there, lab.hydrate(there, made).session, asked, (5,)))

    right = top(lab.one(here, lab.twin(here, session), asked, (5,)))
    assert after(plan) == right
    beside: list[SessionRef] = [lab.begin(here, count, start=count) for count in (20, 200, 310)]
    noise = largest(right, top(lab.run(here, lab.twin(here, session), *beside, sampling=asked, prompt=(5,))[0]))
    wrong, piece = dict[str, HydratePlan](), len(plan.slices) - 1
    for group in token_groups(plan.identity.groups):
        wrong[f"{group.name} of another session"] = mixed(plan, strange, group.name)
        wrong[f"{group.name}: halves exchanged"] = tampered(plan, halves_swapped, piece=piece, group=group.name)
    moved = {what: largest(right, after(bad)) for what, bad in wrong.items()}
    print({what: f"{value:.2g}" for what, value in moved.items()}, f"noise {noise:.2g}")
    assert min(moved.values()) > max(POWER * noise, 1e-6), (noise, moved)


def test_snapshots_cross_to_transformers(kind: str, model: Path, here: VllmEngine, lab: Lab) -> None:
    """One identity, and one form: the same numbers but for rounding. gpt-oss has other windows in vLLM than in
    transformers where its config does not alternate; here it does."""
    with load_engine("transformers", model=str(model), device="cpu" if ON_CPU else "cuda") as stock:
        assert stock.identity() == here.identity()
        session = lab.begin(here, 300)
        plan = lab.plan(lab.capture(here, session))
        right = top(lab.one(here, lab.twin(here, session), greedy(1, logprobs=20), (5,)))
        theirs = top(lab.one(stock, lab.hydrate(stock, plan).session, greedy(1, logprobs=20), (5,)))
        near = largest(right, theirs)
        swapped = [
            largest(right, top(lab.one(stock, lab.hydrate(stock, bad).session, greedy(1, logprobs=20), (5,))))
            for bad in (tampered(plan, halves_swapped, piece=len(plan.slices) - 1, group=group.name)
                        for group in token_groups(plan.identity.groups))
        ]  # fmt: skip
        print(f"apart {near:.2g}, wrong {[f'{far:.2g}' for far in swapped]}, noise is not told from rounding here")
        assert near < min(swapped) / POWER
