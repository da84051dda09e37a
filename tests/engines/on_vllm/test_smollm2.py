"""The real model on real vLLM: what the law book says of a small random model holds of SmolLM2, reading English.

Two engines that share nothing but a folder of packs: one in process, with few blocks, and a stock OpenAI server. What
one of them leaves in the middle of a turn goes on in the other, both ways. Bits are compared at equal batch shape;
what other shapes change is measured and printed (`pytest -s`, or -rP).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from test_http import Server
from test_operators import Owner

import thaw
from thaw.core.errors import CorruptBlob
from thaw.demo import document
from thaw.engines import load_engine
from thaw.engines.base import Completion, Engine, SessionRef
from thaw.engines.served.client.engine import ServedEngine
from thaw.testing.laws.kit import LIMIT_S, Lab, bits, greedy, same, seeded
from thaw.testing.plans import flip_byte, halves_swapped, mount_at, tampered

pytest.importorskip("vllm")

from thaw.engines.vllm.client.engine import VllmEngine

BLOCKS = 24
BLOCK = 128
LIMIT = 1024
READ = 300
"""Tokens that a session has read: two full blocks, and a third in part."""
ANSWER = 48
STYLES = {
    "greedy": greedy(ANSWER, logprobs=3),
    "seeded": seeded(ANSWER, temperature=0.8, top_p=0.9),
    "penalties": seeded(
        ANSWER, temperature=0.9, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3, top_p=0.95
    ),
}
OUT, BACK = "in process, then over HTTP", "over HTTP, then in process"
WAYS = {OUT: ("here", "there"), BACK: ("there", "here")}
OFTEN = {("greedy", BACK), ("seeded", OUT), ("seeded", BACK), ("penalties", OUT)}
"""Of all styles and ways, those of `make test`."""
RARELY = pytest.mark.soak("one more style and way", receipt="vllm-real-model-styles-and-ways")


@pytest.fixture(scope="module")
def here(demo_model: Path) -> Iterator[VllmEngine]:
    options = {"enforce_eager": True, "max_model_len": LIMIT, "num_gpu_blocks_override": BLOCKS}
    with load_engine("vllm", model=str(demo_model), **options) as loaded:
        assert isinstance(loaded, VllmEngine) and int(loaded.info.numerics["block_size"]) == BLOCK
        yield loaded


@pytest.fixture(scope="module")
def there(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedEngine]:
    server = Server(demo_model, tmp_path_factory.mktemp("server"), "--max-model-len", str(LIMIT))
    try:
        with thaw.attach(server.url) as engine:
            assert isinstance(engine, ServedEngine)
            yield engine
    finally:
        server.stop()


@pytest.fixture
def both(request: pytest.FixtureRequest) -> tuple[Engine, Engine]:
    """Where a session begins, and where it goes on."""
    begins, goes_on = WAYS[request.param]
    return request.getfixturevalue(begins), request.getfixturevalue(goes_on)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


def english(engine: Engine, start: int = 0, count: int = READ) -> tuple[int, ...]:
    """`count` tokens of the demo's document, from `start` on."""
    found = engine.codec.encode(document(), first=True)[start : start + count]
    assert len(found) == count
    return tuple(found)


def begin(engine: Engine, start: int = 0, count: int = READ) -> SessionRef:
    session = engine.open(seed=20)
    engine.append(session, english(engine, start, count)).result(LIMIT_S)
    return session


def cycle(engine: Engine) -> None:
    """Other sessions' prompts through the whole pool."""
    for i in range(4):
        engine.close_session(begin(engine, 400 + 700 * i, 800))


# --- resume


@pytest.mark.parametrize(
    ("style", "both"),
    [pytest.param(style, way, marks=() if (style, way) in OFTEN else RARELY) for style in STYLES for way in WAYS],
    indirect=["both"],
)
def test_a_turn_stopped_in_its_middle_goes_on_in_another_engine_bit_for_bit(
    both: tuple[Engine, Engine], lab: Lab, style: str
) -> None:
    begins, goes_on = both
    session, part, whole = lab.stopped_amid(begins, begin(begins), after=8, samplings=[STYLES[style]] * 5)
    kept = len(part.token_ids)
    plan = lab.plan(lab.capture(begins, session))
    moved = lab.hydrate(goes_on, plan)
    assert len(plan.tokens) == READ + kept and moved.proof.num_cached_tokens == READ + kept - 1
    resumed = lab.resume(goes_on, moved.session)[0]
    same(whole, resumed)
    assert (resumed.num_cached_tokens, resumed.usage.num_prefilled_tokens) == (READ + kept - 1, 1)


def test_the_three_styles_say_different_things(here: VllmEngine, lab: Lab) -> None:
    """Control: whoever resumed with another's parameters, or with another seed, would be seen."""
    session = begin(here)
    said = [lab.one(here, lab.twin(here, session), sampling).token_ids for sampling in STYLES.values()]
    said.append(lab.one(here, lab.fork(here, session)[0], STYLES["seeded"]).token_ids)
    assert len(set(said)) == 4


@pytest.mark.parametrize("both", [OUT], indirect=True)
def test_captured_while_it_decodes_it_goes_on_in_another_engine_bit_for_bit(
    both: tuple[Engine, Engine], lab: Lab
) -> None:
    begins, goes_on = both
    session = begin(begins, 100)
    captured, whole = lab.captured_amid(begins, session)
    same(whole, lab.resume(goes_on, lab.hydrate(goes_on, lab.plan(captured)).session)[0])


# --- the pool


def test_parked_it_outlives_three_cycles_of_the_pool(here: VllmEngine, lab: Lab) -> None:
    session = begin(here, 200)
    expected = lab.one(here, lab.twin(here, session), seeded(16))
    assert gone_of(here, lab, session) == 0, "control: nothing has pushed its blocks out yet"
    assert here.park(session).result(LIMIT_S).parked
    for _ in range(3):
        cycle(here)
    before = here.stats()
    back = lab.one(here, session, seeded(16))
    after = here.stats()
    same(expected, back)
    assert after["hit_tokens"] == before["hit_tokens"], "vLLM has none of its blocks any more"
    assert after["loaded_tokens"] - before["loaded_tokens"] == READ - 1
    assert (back.num_cached_tokens, back.usage.num_prefilled_tokens) == (READ - 1, 1)


def gone_of(engine: ServedEngine, lab: Lab, session: SessionRef) -> int:
    """How many tokens of the session's full blocks vLLM has no more."""
    before = engine.stats()["hit_tokens"]
    lab.one(engine, lab.twin(engine, session), greedy(1))
    return READ // BLOCK * BLOCK - (engine.stats()["hit_tokens"] - before)


# --- negative controls


@pytest.mark.parametrize("piece", [0, -1])
def test_negative_control_one_block_of_wrong_kv_changes_the_logprobs(here: VllmEngine, lab: Lab, piece: int) -> None:
    session = begin(here, 300)
    plan = lab.plan(lab.capture(here, session))
    right = lab.one(here, session, greedy(8))
    wrong = tampered(plan, halves_swapped, piece=piece % len(plan.slices))
    good, bad = (lab.one(here, lab.hydrate(here, one).session, greedy(8)) for one in (plan, wrong))
    same(right, good)
    print(f"\none block of one head wrong: first log probability {right.logprobs[0]:.4f} became {bad.logprobs[0]:.4f}")
    assert bits(right.logprobs)[0] != bits(bad.logprobs)[0]


def test_negative_control_a_damaged_blob_is_refused_by_name(here: VllmEngine, lab: Lab) -> None:
    plan = lab.plan(lab.capture(here, begin(here, 300)))
    lab.hydrate(here, plan)
    victim = plan.slices[0].blobs[plan.identity.groups[0].name][0]
    flip_byte(lab.packs, victim, at=victim.nbytes // 2)
    with pytest.raises(CorruptBlob, match=victim.blob):
        lab.hydrate(here, plan)


def test_negative_control_a_request_with_another_salt_finds_nothing(here: VllmEngine, lab: Lab) -> None:
    """A session's blocks are its lineage's. The plain request's own blocks show that the counter counts."""
    session = begin(here, 500)
    owner = Owner(here)
    assert owner.plain(english(here, 500)).num_cached_tokens == 0
    assert owner.plain(english(here, 500)).num_cached_tokens == READ // BLOCK * BLOCK
    stranger = lab.one(here, here.open(seed=20), greedy(2), english(here, 500))
    assert (stranger.num_cached_tokens, stranger.usage.num_prefilled_tokens) == (0, READ)
    assert lab.one(here, session, greedy(2)).num_cached_tokens == READ - 1


# --- other batch shapes


def test_other_batch_shapes_are_measured_and_equal_ones_are_equal(here: VllmEngine, lab: Lab) -> None:
    """What is promised is that equal shapes give equal bits. How far others lie apart is the engine's, and printed."""
    count = 200  # with its answer two blocks, so that eight of them fit
    session = begin(here, 600, count)
    others = [begin(here, 800 + 200 * i, count) for i in range(7)]
    alone = beside(here, lab, session, ())
    for n in (0, 1, 7):
        first, again = (beside(here, lab, session, others[:n]) for _ in range(2))
        same(first, again)
        equal, largest = difference(alone, first)
        print(f"\nbeside {n}: {equal} of {len(alone.token_ids)} tokens equal, log probabilities within {largest:.6f}")
        if n == 0:
            assert (equal, largest) == (len(alone.token_ids), 0.0), "control: the same shape, the same bits"


def beside(engine: Engine, lab: Lab, session: SessionRef, others: Sequence[SessionRef]) -> Completion:
    """What a session says in one batch with others; all of them stay as they are."""
    twins = [lab.twin(engine, one) for one in (session, *others)]
    out = lab.run(engine, *twins, sampling=greedy(16))
    for twin in twins:
        engine.close_session(twin)
    return out[0]


def difference(one: Completion, two: Completion) -> tuple[int, float]:
    """How many tokens are equal, from the first on, and the largest difference of their log probabilities."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one.token_ids, two.token_ids, strict=True))
    equal = len(list(pairs))
    logprobs = zip(one.logprobs[:equal], two.logprobs[:equal], strict=True)
    return equal, max((abs(a - b) for a, b in logprobs), default=0.0)
