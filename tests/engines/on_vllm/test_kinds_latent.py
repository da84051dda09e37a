"""Latents (MLA) in a real vLLM: one vector a token and layer, the same on every rank and stored once.

The small model is of DeepSeek V3's kind with its latent of 512 + 64 numbers, the one width that vLLM has on a CPU. Its
blocks have 16 tokens there, and there is no prefix cache, so a fork loads all that it continues from.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from vllm_shapes import LATENT, RANK, ROPED, V3

from kind_models import make_kind_model
from thaw.core.cache import LatentKV
from thaw.core.errors import Unsupported
from thaw.engines import load_engine
from thaw.engines.base import Engine, HydratePlan
from thaw.testing import CrossingTests, ExactnessTests
from thaw.testing.laws.bytes_law import kv_nbytes
from thaw.testing.laws.crossing_law import largest, top
from thaw.testing.laws.groups_law import GroupsLaw
from thaw.testing.laws.kit import Lab, every_knob, greedy, ids, same, seeded
from thaw.testing.laws.proof_law import ProofLaw
from thaw.testing.plans import halves_swapped, mount_at, tampered

vllm = pytest.importorskip("vllm")
if tuple(int(part) for part in vllm.__version__.split(".")[:2]) < (0, 32):
    pytest.skip("older releases refuse latents by name", allow_module_level=True)

from thaw.engines.vllm.client.engine import VllmEngine  # noqa: E402

WIDTH = RANK + ROPED
BLOCK = 16
KINDS = [
    pytest.param(("deepseek_v3", V3), id="deepseek_v3"),
    *(
        pytest.param((arch, more), id=arch, marks=pytest.mark.slow("the same on one more model of the kind"))
        for arch, more in (("deepseek_v2", {}), ("glm4_moe_lite", V3))
    ),
]
ONCE_MORE = pytest.mark.soak("two ranks of one more model of the kind", receipt="vllm-latents-once-more")
ON_RANKS = pytest.mark.parametrize(
    "f32", [KINDS[0], *(pytest.param(*kind.values, id=kind.id, marks=ONCE_MORE) for kind in KINDS[1:])], indirect=True
)
CUTS = sorted({*random.Random(23).sample(range(2, 700), 20), 255, 256, 257, 15 * BLOCK - 1, 15 * BLOCK + 1, 15 * BLOCK})
POWER = 100
"""How many times more than the noise of a batch's shape a control must move a log probability."""
OPTIONS = {"enforce_eager": True, "max_model_len": 4096}


IN_FLOAT32 = {"dtype": "float32", "attention_backend": "CPU_MLA"}
"""vLLM's own choice on a processor with AMX takes bfloat16 alone."""


def boot(folder: Path, **changes: Any) -> VllmEngine:
    return cast(VllmEngine, load_engine("vllm", **{**OPTIONS, "model": str(folder), **changes}))


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kind_model("deepseek_v3", tmp_path_factory.mktemp("latents") / "bf16", dtype="bfloat16", **LATENT | V3)


@pytest.fixture(scope="module", params=KINDS)
def f32(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, where noise is small enough for controls to be seen."""
    arch, more = request.param
    return make_kind_model(arch, tmp_path_factory.mktemp("latents") / arch, dtype="float32", **LATENT | more)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


class TestLatents(ExactnessTests, GroupsLaw, ProofLaw):
    """`other` is another engine process."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls, bf16: Path) -> Callable[..., Engine]:
        return lambda **changes: boot(bf16, **changes)

    def test_the_group_is_a_latent_of_which_any_token_can_be_forked(self, engine: Engine) -> None:
        (group,) = engine.info.groups
        assert group == LatentKV(name="latent", first_layer=0, num_layers=3, width=WIDTH, dtype="bfloat16")
        assert engine.identity().groups == engine.info.groups and "interior-points" in engine.info.capabilities

    def test_a_snapshot_has_one_vector_a_token_and_layer(self, engine: Engine, lab: Lab) -> None:
        captured = lab.capture(engine, lab.begin(engine, 700))
        assert kv_nbytes(captured) == captured.num_kv * 3 * WIDTH * 2

    def test_a_cut_anywhere_continues_like_the_uninterrupted_parent(
        self, engine: Engine, other: Engine, lab: Lab
    ) -> None:
        for count in CUTS:
            session = lab.begin(engine, count, start=count)
            moved = lab.move(engine, session, other)
            same(lab.one(engine, session, seeded(6), (5,)), lab.one(other, moved, seeded(6), (5,)))
            for ref, owner in ((session, engine), (moved, other)):
                owner.close_session(ref)

    def test_a_cut_in_the_middle_of_generating_continues_like_the_uninterrupted_parent(
        self, engine: Engine, other: Engine, lab: Lab
    ) -> None:
        for count in (30, 250):
            captured, whole = lab.captured_amid(engine, lab.begin(engine, count))
            same(whole, lab.resume(other, lab.hydrate(other, lab.plan(captured)).session)[0])

    def test_twenty_turns_write_their_own_tokens_and_the_last_goes_on_like_its_parent(
        self, engine: Engine, other: Engine, lab: Lab
    ) -> None:
        session = lab.begin(engine, 250)
        captures = [lab.capture(engine, session)]
        for turn in range(20):
            lab.one(engine, session, every_knob(), ids(4, 9 + turn))
            captures.append(lab.capture(engine, session, captures[-1].num_kv))
        plan = lab.plan(captures[-1], *captures[:-1])
        same(lab.one(engine, session, seeded(8)), lab.one(other, lab.hydrate(other, plan).session, seeded(8)))


# --- controls, and other engines


@pytest.fixture(scope="module")
def engine(f32: Path) -> Iterator[VllmEngine]:
    with boot(f32, **IN_FLOAT32) as loaded:
        yield loaded


def in_pairs(data: bytes) -> bytes:
    """A blob whose roped part goes from halves to pairs, or to nonsense where it has pairs."""
    latents = torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, WIDTH)
    latents[:, RANK:] = torch.stack(latents[:, RANK:].chunk(2, dim=-1), dim=-1).flatten(-2)
    return latents.numpy().tobytes()


def of_another(strange: bytes, first: int, stop: int) -> Callable[[bytes], bytes]:
    """A blob with tokens [first, stop) of another session's, in all layers."""

    def change(data: bytes) -> bytes:
        mine, theirs = (torch.frombuffer(bytearray(d), dtype=torch.float32).view(3, -1, WIDTH) for d in (data, strange))
        mine[:, first:stop] = theirs[:, first:stop]
        return mine.numpy().tobytes()

    return change


def test_controls_that_can_see(engine: VllmEngine, lab: Lab) -> None:
    """Wrong latents of a block, of one token, of another session or in another order move a log probability far more
    than a batch of other shape does."""
    session, stranger = lab.begin(engine, 300), lab.begin(engine, 300, start=7)
    plan, strange = (lab.plan(lab.capture(engine, one)) for one in (session, stranger))
    bytes_of = [lab.read(piece.blobs["latent"][0]) for piece in strange.slices]

    def after(made: HydratePlan) -> dict[int, float]:
        return top(lab.one(engine, lab.hydrate(engine, made).session, greedy(1, logprobs=50), (5,)))

    right = top(lab.one(engine, lab.twin(engine, session), greedy(1, logprobs=50), (5,)))
    assert after(plan) == right
    beside = [lab.begin(engine, count, start=count) for count in (20, 200)]
    batched = lab.run(engine, lab.twin(engine, session), *beside, sampling=greedy(1, logprobs=50), prompt=(5,))[0]
    halved = engine.open(seed=1)
    for part in (ids(300)[:150], ids(300)[150:]):
        engine.append(halved, part).result()
    noise = max(largest(right, top(one)) for one in (batched, lab.one(engine, halved, greedy(1, logprobs=50), (5,))))
    wrong = {
        "the last block of another session": tampered(plan, of_another(bytes_of[-1], 16, 32), piece=1),
        "one token of another session": tampered(plan, of_another(bytes_of[-1], 42, 43), piece=1),
        "the first block of another session": tampered(plan, of_another(bytes_of[0], 0, 16)),
        "the first piece of another session": tampered(plan, of_another(bytes_of[0], 0, 256)),
        "the roped part in another order": tampered(plan, in_pairs),
        "halves exchanged": tampered(plan, halves_swapped),
    }
    moved = {what: largest(right, after(bad)) for what, bad in wrong.items()}
    print({what: f"{value:.2g}" for what, value in moved.items()}, f"noise {noise:.2g}")
    assert 0 < noise < min(moved.values()) / POWER, (noise, moved)


class TestVllmAndTransformers(CrossingTests):
    tolerance = 1e-3

    @pytest.fixture(scope="class")
    @classmethod
    def here(cls, f32: Path) -> Iterator[Engine]:
        with load_engine("transformers", model=str(f32)) as loaded:
            yield loaded

    @pytest.fixture
    def there(self, engine: VllmEngine) -> Engine:
        return engine

    def wrong(self, plan: HydratePlan) -> dict[str, HydratePlan]:
        return super().wrong(plan) | {"the roped part in another order": tampered(plan, in_pairs)}

    def test_the_numbers_of_a_token_stand_in_the_same_order(self, here: Engine, there: Engine, lab: Lab) -> None:
        """Compressed KV, then the roped part: equal but for rounding, number by number."""
        read = [
            torch.frombuffer(bytearray(lab.read(captured.blobs[0])), dtype=torch.float32).view(3, -1, WIDTH)
            for captured in (lab.capture(one, lab.begin(one, 300)) for one in (here, there))
        ]
        torch.testing.assert_close(*read, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(read[0][..., RANK:], read[1][..., RANK:].roll(1, -1), atol=1e-1)


# --- two ranks


@pytest.fixture(scope="module")
def two(f32: Path) -> Iterator[VllmEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        loaded = boot(f32, **IN_FLOAT32, tensor_parallel_size=2)
    with loaded:
        yield loaded


@ON_RANKS
def test_latents_are_written_by_the_first_rank_alone(two: VllmEngine, lab: Lab) -> None:
    captured = lab.capture(two, lab.begin(two, 700))
    assert two.info.num_packs == 2 and len(captured.packs) == 1
    assert kv_nbytes(captured) == captured.num_kv * 3 * WIDTH * 4


@ON_RANKS
def test_two_ranks_go_on_bit_for_bit(two: VllmEngine, lab: Lab) -> None:
    parent = lab.begin(two, 700)
    lab.one(two, parent, seeded(8))
    child = lab.move(two, parent, two)
    same(lab.one(two, child, every_knob(), ids(4, 2)), lab.one(two, parent, every_knob(), ids(4, 2)))


@ON_RANKS
class TestAcrossRankCounts(CrossingTests):
    tolerance = 1e-3

    @pytest.fixture
    def here(self, two: VllmEngine) -> Engine:
        return two

    @pytest.fixture
    def there(self, engine: VllmEngine) -> Engine:
        return engine


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}, "plain rope on a CPU"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"index_topk": 64}, r"sparse attention \(DSA\)"),
    ],
)
def test_what_is_not_plain_mla_is_refused_by_name_before_vllm_starts(
    changes: dict[str, Any], named: str, bf16: Path, tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match=named):
        boot(shutil.copytree(bf16, tmp_path / "model"), hf_overrides=changes)
