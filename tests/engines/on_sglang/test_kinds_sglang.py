"""Other kinds of cache on SGLang, each on a small random model: latents (MLA) and sliding windows.

SGLang runs with one uniform pool, so that layers with a window keep the KV of every token. A snapshot holds of a window
what goes on from its end; slots that hold nothing of a window are filled with junk here, so that whatever is read that
was not loaded would be seen. Pages have 16 tokens.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from faults import Faults
from safetensors.torch import load_file, save_file

from kind_models import WINDOW, make_kind_model
from thaw.core.cache import SlidingKV, TokenGroup, token_groups
from thaw.core.errors import EngineDied, NotKept
from thaw.engines import load_engine
from thaw.engines.base import Captured, Completion, Engine, HydratePlan, SessionRef
from thaw.engines.hf.config import load_config
from thaw.engines.sglang.client.engine import SglangEngine
from thaw.testing import ExactnessTests
from thaw.testing.laws.bytes_law import blob_ids, kv_nbytes
from thaw.testing.laws.groups_law import GroupsLaw, least
from thaw.testing.laws.kit import Lab, Load, greedy, ids, same, seeded
from thaw.testing.laws.proof_law import ProofLaw
from thaw.testing.plans import halves_swapped, mount_at, tampered
from thaw.testing.resume_worker import ResumeJob, ResumeRound, answer, run_fresh

pytest.importorskip("sglang")

KINDS = {
    "minicpm3": "latents",
    "mellum": "windows, which have a pool of their own unless it is told",
    "olmo3": "windows",
    "gemma3_text": "windows, with a rope of their own",
}
QUICK = ("minicpm3", "mellum")
TIED = {
    "gemma3_text": "model.embed_tokens.weight",
    "cohere": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
}
"""Models of which SGLang reads no head beside these embeddings."""
ROPES = {kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in ("full_attention", "sliding_attention")}
PAGE = 16
CUTS = sorted({*random.Random(23).sample(range(2, 400), 20), 255, 256, 257, WINDOW - 1, WINDOW, WINDOW + 1, 15, 16, 17})
POWER = 100
"""How many times more than the noise of a batch's shape a control must move a log probability."""
POWER_OF_ONE = POWER
"""The same where one token is wrong."""
ROOM: dict[str, object] = {"dtype": "float32", "max_model_len": 3300, "max_total_tokens": 16_384, "page_size": PAGE}


def some() -> list[object]:
    slow = pytest.mark.slow("the same on one more model of the kind")
    return [pytest.param(kind, marks=() if kind in QUICK else slow) for kind in KINDS]


ONCE_MORE = pytest.mark.soak("the same on one more model of the kind", receipt="sglang-kinds-once-more")
ONE_OF_EACH = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else ONCE_MORE) for kind in KINDS], indirect=True
)
"""For what boots an engine of its own."""


@pytest.fixture(scope="module", params=some())
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(kind, tiny_model, tmp_path_factory.mktemp("made"))


def made(kind: str, tiny_model: Callable[..., Path], folder: Path, **more: Any) -> Path:
    """A model that SGLang computes as its config says."""
    if kind in TIED:
        return tied(tiny_model(kind, tie_word_embeddings=True, **more), folder, TIED[kind])
    if kind == "olmo3":
        return make_kind_model(kind, folder, rope_parameters=dict(ROPES), **more)
    return tiny_model(kind, **more)


def tied(source: Path, folder: Path, embeddings: str) -> Path:
    """A model whose embeddings are its head too. They are made small, for else each token would be followed by itself,
    whatever the cache holds."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    tensors[embeddings] = tensors[embeddings] * 0.1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def engine(kind: str, folder: Path, faults: Faults) -> Iterator[SglangEngine]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in faults.environment.items():
            patch.setenv(name, value)
        loaded = load_engine("sglang", model=str(folder), **ROOM)
    assert isinstance(loaded, SglangEngine)
    with loaded, faults.on("junk", 0):
        yield loaded


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


def windowed(engine: SglangEngine) -> list[TokenGroup]:
    return [group for group in token_groups(engine.info.groups) if isinstance(group, SlidingKV)]


def test_its_groups_are_those_of_the_transformers_engine(engine: SglangEngine, folder: Path) -> None:
    """Those that it reads from the config: so that identities are equal, field by field."""
    from thaw.engines.hf.groups import groups

    found = groups(load_config(folder).get_text_config().to_dict(), "float32")
    assert found and engine.info.groups == found == engine.identity().groups


def test_a_cut_anywhere_goes_on_like_the_uninterrupted_parent(engine: SglangEngine, lab: Lab) -> None:
    """Also at the edges of a page, of a segment and of the window."""
    for count in CUTS:
        session = lab.begin(engine, count, start=count)
        plan = lab.plan(lab.capture(engine, session))
        whole = lab.one(engine, session, seeded(4), (5,))
        restored = lab.hydrate(engine, plan)
        assert restored.proof.num_cached_tokens == plan.num_kv == count - 1
        out = lab.one(engine, restored.session, seeded(4), (5,))
        same(whole, out)
        assert (out.num_cached_tokens, out.usage.num_prefilled_tokens) == (count - 1, 2), count
        for ref in (session, restored.session):
            engine.close_session(ref)


def test_a_cut_in_the_middle_of_generating_goes_on_like_the_uninterrupted_parent(
    engine: SglangEngine, lab: Lab
) -> None:
    for count in (WINDOW - 10, 250):
        captured, whole = lab.captured_amid(engine, lab.begin(engine, count))
        same(whole, lab.resume(engine, lab.hydrate(engine, lab.plan(captured)).session)[0])


def test_twenty_turns_write_their_own_tokens_and_the_last_goes_on_like_its_parent(
    engine: SglangEngine, lab: Lab
) -> None:
    session, captures = lab.begin(engine, 250), list[Captured]()
    for turn in range(20):
        out = lab.one(engine, session, seeded(3), ids(4, 9 + turn))
        assert out.usage.num_prefilled_tokens <= 6, "only what is new is read"
        captures.append(lab.capture(engine, session, captures[-1].num_kv if captures else 0))
    plan = lab.plan(captures[-1], *captures[:-1])
    same(lab.one(engine, session, seeded(8)), lab.one(engine, lab.hydrate(engine, plan).session, seeded(8)))


@pytest.mark.parametrize("count", [100, 1000, 3000])
def test_a_snapshot_is_as_large_as_its_groups_shares(engine: SglangEngine, lab: Lab, count: int) -> None:
    """At most 3 % over the full groups' bytes and, of a window, those of window + 255 tokens; a latent's once."""
    session = lab.begin(engine, count)
    captured = lab.capture(engine, session)
    groups = token_groups(engine.info.groups)
    shares = [min(1, (group.window + 255) / count) if isinstance(group, SlidingKV) else 1 for group in groups]
    limit = sum(group.token_nbytes * count * share for group, share in zip(groups, shares, strict=True))
    assert kv_nbytes(captured) <= 1.03 * limit
    again = lab.capture(engine, lab.hydrate(engine, lab.plan(captured)).session)
    assert blob_ids(again) == blob_ids(captured)


def test_a_live_session_goes_on_from_any_token_and_a_restored_one_from_those_it_has(
    engine: SglangEngine, lab: Lab
) -> None:
    session = lab.begin(engine, 300)
    whole = lab.one(engine, session, seeded(20))
    for at in (2, WINDOW, 200, 310):
        child = lab.twin(engine, session, at=at)
        moved = lab.move(engine, lab.twin(engine, session, at=at), engine)
        same(lab.one(engine, child, seeded(4), (7,)), lab.one(engine, moved, seeded(4), (7,)))
    restored = lab.move(engine, session, engine)
    num_tokens = len(engine.view(restored).tokens)
    last = lab.twin(engine, restored, at=num_tokens)
    same(lab.one(engine, session, seeded(4), (7,)), lab.one(engine, last, seeded(4), (7,)))
    assert len(whole.token_ids) == 20
    for group in windowed(engine):
        with pytest.raises(NotKept, match=rf"{group.name} needs tokens .* from token \d+ or a later one"):
            lab.fork(engine, restored, at=num_tokens - 5)
    if not windowed(engine):
        lab.one(engine, lab.twin(engine, restored, at=num_tokens - 5), seeded(4), (7,))


def test_children_of_a_restored_session_need_one_load(engine: SglangEngine, lab: Lab) -> None:
    session = lab.begin(engine, 1001)
    restored = lab.move(engine, session, engine)
    here = lab.run(engine, *lab.fork(engine, session, 4), sampling=seeded(6))
    before = engine.stats()["loaded_tokens"]
    there = lab.run(engine, *lab.fork(engine, restored, 4), sampling=seeded(6))
    for one, two in zip(here, there, strict=True):
        same(one, two)
    assert engine.stats()["loaded_tokens"] - before <= 1000 + 4 * PAGE


def test_what_was_restored_is_found_by_nobody_else(engine: SglangEngine, lab: Lab) -> None:
    """A session that shares its prefix may not leave behind what another would read: its windows begin late."""
    prompt = ids(300)
    open_one = engine.open(seed=20, share_prefix=True)
    engine.append(open_one, prompt).result(60)
    right = lab.one(engine, open_one, greedy(6), (5,))
    engine.flush_cache()
    restored = lab.move(engine, open_one, engine)
    lab.one(engine, restored, greedy(2))
    fresh = engine.open(seed=20, share_prefix=True)
    engine.append(fresh, prompt).result(60)
    assert lab.one(engine, fresh, greedy(6), (5,)).token_ids == right.token_ids


def test_nothing_leaks(engine: SglangEngine) -> None:
    stats = engine.stats()
    assert stats["free_tokens"] + stats["evictable_tokens"] + stats["protected_tokens"] == stats["tokens"]


# -- controls


def moved(one: Completion, two: Completion) -> float:
    """How far the first token's log probabilities are apart, of those that both name."""
    a, b = (dict(out.top_logprobs[0]) for out in (one, two) if out.top_logprobs)
    assert a.keys() & b.keys()
    return max(abs(a[token] - b[token]) for token in a.keys() & b.keys())


def test_controls_that_can_see(engine: SglangEngine, lab: Lab) -> None:
    """A page of another session, one token of it, and a window one token short: each moves a log probability by far
    more than the shape of a batch does."""
    asked, count = greedy(1, logprobs=100), 350
    session = lab.begin(engine, count)
    plan, foreign = (lab.plan(lab.capture(engine, one)) for one in (session, lab.begin(engine, count, start=7)))
    right = lab.one(engine, lab.twin(engine, session), asked, (5,))
    at_once = lab.one(engine, engine.open(seed=20), asked, (*ids(count), 5))
    beside = lab.run(engine, lab.twin(engine, session), lab.twin(engine, session), sampling=asked, prompt=(5,))
    noise = max(moved(right, out) for out in (at_once, *beside))
    seen = {}
    for group in token_groups(engine.info.groups):
        for what, first, stop in ranges(group, plan.num_kv):
            for other in (foreign, None):
                wrong = replaced(plan, group, first, stop, lab, other)
                out = lab.one(engine, lab.hydrate(engine, wrong).session, asked, (5,))
                seen[f"{group.name}: {what}, {'foreign' if other else 'zeros'}"] = moved(right, out)
    limits = {what: (POWER_OF_ONE if "one token" in what else POWER) * noise for what in seen}
    blind = {what: value for what, value in seen.items() if value < max(limits[what], 1e-9)}
    assert blind == {}, (noise, seen)
    print({what: f"{value:.2g}" for what, value in seen.items()}, f"noise {noise:.2g}")


def ranges(group: TokenGroup, num_kv: int) -> list[tuple[str, int, int]]:
    """Tokens that are to be wrong: the last page, the last token, and of a window its first token for who goes on."""
    first = group.covers(num_kv + 1).start
    found = [("the last page", num_kv // PAGE * PAGE - PAGE, num_kv), ("one token", num_kv - 2, num_kv - 1)]
    return [*found, ("a window one token short", first, first + 1)] if isinstance(group, SlidingKV) else found


def replaced(
    plan: HydratePlan, group: TokenGroup, first: int, stop: int, lab: Lab, other: HydratePlan | None
) -> HydratePlan:
    """The plan with tokens [first, stop) of a group taken from `other`, or zeros. They lie in its last segment."""
    piece = len(plan.slices) - 1
    own = plan.slices[piece]
    start = own.first.get(group.name, own.start)
    assert start <= first < stop <= own.start + own.length

    def changed(head: int) -> Callable[[bytes], bytes]:
        def change(data: bytes) -> bytes:
            source = lab.read(other.slices[piece].blobs[group.name][head]) if other is not None else bytes(len(data))
            out, at = bytearray(data), 0
            for width in group.planes:
                a, b = at + (first - start) * width, at + (stop - start) * width
                out[a:b] = source[a:b]
                at += (own.start + own.stored - start) * width
            assert at == len(data)
            return bytes(out)

        return change

    for head in range(group.num_blobs):
        plan = tampered(plan, changed(head), piece=piece, head=head, group=group.name)
    return plan


@pytest.mark.parametrize("way", ["to", "from"])
def test_a_snapshot_crosses_to_transformers_and_back(engine: SglangEngine, folder: Path, lab: Lab, way: str) -> None:
    """The bytes are equal, and the log probabilities differ by far less than they do with wrong KV of any group."""
    with load_engine("transformers", model=str(folder)) as other:
        assert engine.identity() == other.identity()
        giver, taker = (engine, other) if way == "to" else (other, engine)
        session = lab.begin(giver, 301)
        plan = lab.plan(lab.capture(giver, session))
        again = lab.capture(taker, lab.hydrate(taker, plan).session)
        assert again.num_kv == plan.num_kv and located(lab.plan(again)) == located(plan)

        def first(runs: Engine, one: SessionRef) -> Completion:
            return lab.one(runs, one, greedy(1, logprobs=100), (5,))

        right = first(giver, session)
        differs = moved(right, first(taker, lab.hydrate(taker, plan).session))
        for group in token_groups(plan.identity.groups):
            wrong = tampered(plan, halves_swapped, piece=len(plan.slices) - 1, group=group.name)
            far = moved(right, first(taker, lab.hydrate(taker, wrong).session))
            assert far > POWER * differs, (group.name, far, differs)


def located(plan: HydratePlan) -> list[dict[str, list[str]]]:
    """The blobs of each segment that are needed at the plan's end."""
    needed = least(plan).slices
    return [{group: [place.blob for place in places] for group, places in piece.blobs.items()} for piece in needed]


@ONE_OF_EACH
@pytest.mark.slow("boots the engine in another process")
def test_a_new_process_continues_bit_for_bit(engine: SglangEngine, folder: Path, lab: Lab, tmp_path: Path) -> None:
    sessions = [lab.begin(engine, count) for count in (41, 256, 301)]
    plans = [lab.plan(lab.capture(engine, session)) for session in sessions]
    rounds = tuple(ResumeRound(plans=(plan,), sampling=seeded(8), prompt=(5,)) for plan in plans)
    options = {"model": str(folder), **ROOM}
    report = run_fresh(ResumeJob(engine="sglang", options=options, rounds=rounds), tmp_path)  # type: ignore[arg-type]
    for session, done in zip(sessions, report.rounds, strict=True):
        own, theirs = answer(lab.one(engine, session, seeded(8), (5,))), done.completions[0]
        assert (own.token_ids, own.logprobs) == (theirs.token_ids, theirs.logprobs)


@pytest.mark.slow("boots SGLang")
def test_a_model_that_sglang_computes_otherwise_is_refused_by_name(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(EngineDied, match=r"olmo3 with ropes of base 500000.* takes 10000"):
        load_engine("sglang", model=str(tiny_model("olmo3")), **ROOM)


@pytest.mark.slow("boots SGLang")
def test_windows_in_a_pool_of_their_own_are_refused_by_the_flag(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(EngineDied, match="--disable-hybrid-swa-memory"):
        load_engine("sglang", model=str(tiny_model("mellum")), disable_hybrid_swa_memory=False, **ROOM)


@pytest.mark.slow("boots SGLang")
@pytest.mark.parametrize("shape", ["gpt2", "cohere"])
def test_full_attention_of_a_models_own(shape: str, tiny_model: Callable[..., Path], tmp_path: Path, lab: Lab) -> None:
    """Learned positions, scaled logits: the cuts go on bit for bit, and other KV would show."""
    with load_engine("sglang", model=str(made(shape, tiny_model, tmp_path / "made")), **ROOM) as engine:
        for count in (17, 256, 301):
            session = lab.begin(engine, count, start=count)
            plan = lab.plan(lab.capture(engine, session))
            right = lab.one(engine, session, seeded(8), (5,))
            same(right, lab.one(engine, lab.hydrate(engine, plan).session, seeded(8), (5,)))
            wrong = lab.hydrate(engine, tampered(plan, halves_swapped)).session
            assert lab.one(engine, wrong, seeded(8), (5,)).logprobs != right.logprobs


@ONE_OF_EACH
@pytest.mark.slow("boots an engine of two ranks")
def test_two_ranks_write_what_one_does(engine: SglangEngine, folder: Path, lab: Lab) -> None:
    """A latent is on both ranks and written once; heads of windows are each rank's own."""
    captured = lab.capture(engine, lab.begin(engine, 300))
    with load_engine("sglang", model=str(folder), tensor_parallel_size=2, **ROOM) as two:
        restored = lab.hydrate(two, lab.plan(captured))
        assert restored.proof.num_cached_tokens == 299
        again = lab.capture(two, restored.session)
        assert blob_ids(again) == blob_ids(captured) and kv_nbytes(again) == kv_nbytes(captured)
        whole = lab.one(two, restored.session, seeded(6), (5,))
        twice = lab.hydrate(two, lab.plan(lab.capture(engine, lab.hydrate(engine, lab.plan(again)).session))).session
        same(whole, lab.one(two, twice, seeded(6), (5,)))


def booted(kind: str, tiny_model: Callable[..., Path], folder: Path) -> Load:
    model = made(kind, tiny_model, folder, dtype="bfloat16")
    return lambda **more: load_engine("sglang", **{"model": str(model), "chunked_prefill_size": 512, **more})


@pytest.mark.slow("the law book's chapters on a model with latents")
class TestExactnessOfLatents(ExactnessTests, GroupsLaw, ProofLaw):
    @pytest.fixture(scope="class", params=["minicpm3"])
    @classmethod
    def engine_factory(
        cls, request: pytest.FixtureRequest, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
    ) -> Load:
        return booted(request.param, tiny_model, tmp_path_factory.mktemp("made"))


@pytest.mark.slow("the law book's chapters on a model with windows")
class TestExactnessOfWindows(ExactnessTests):
    """With the windows of all tokens in snapshots, so that the laws of earlier tokens apply."""

    @pytest.fixture(scope="class", params=["mellum"])
    @classmethod
    def engine_factory(
        cls, request: pytest.FixtureRequest, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
    ) -> Load:
        return partial(booted(request.param, tiny_model, tmp_path_factory.mktemp("made")), interior=True)


class TestGroupsOfKinds(GroupsLaw, ProofLaw):
    """The laws of groups and proofs. `other` is the same engine, whose own cache is empty before each law."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, engine: SglangEngine) -> Engine:
        return engine

    @pytest.fixture(scope="class")
    @classmethod
    def other(cls, engine: Engine) -> Engine:
        return engine

    @pytest.fixture(autouse=True)
    def emptied(self, engine: SglangEngine) -> None:
        engine.flush_cache()
