"""Gemma 3 270M on vLLM: trained weights with a window of 512, reading English. What continues from disk says what the
uninterrupted session says, at random cuts and around the window's edge."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

vllm = pytest.importorskip("vllm")
if tuple(int(part) for part in vllm.__version__.split(".")[:2]) < (0, 32):
    pytest.skip("older releases refuse windows by name", allow_module_level=True)

from gemma_model import ensure_gemma  # noqa: E402
from thaw.core.cache import SlidingKV, token_groups  # noqa: E402
from thaw.core.errors import NotKept  # noqa: E402
from thaw.demo.model import DemoModelError  # noqa: E402
from thaw.engines import load_engine  # noqa: E402
from thaw.engines.base import Captured, Engine  # noqa: E402
from thaw.testing.laws.bytes_law import kv_nbytes  # noqa: E402
from thaw.testing.laws.kit import LIMIT_S, SEED, Lab, bits, greedy, same  # noqa: E402
from thaw.testing.plans import mount_at  # noqa: E402

pytestmark = pytest.mark.model("Gemma 3 270M, fetched and converted once")
WINDOW = 512
PROSE = Path(__file__).parents[3] / "docs" / "architecture.md"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    try:
        folder = ensure_gemma()
    except DemoModelError as error:
        pytest.skip(f"Gemma 3 270M cannot be had here: {error}")
    with load_engine("vllm", model=str(folder), enforce_eager=True, max_model_len=2048) as running:
        yield running


@pytest.fixture(scope="module")
def text(engine: Engine) -> tuple[int, ...]:
    return tuple(engine.codec.encode(PROSE.read_text("utf-8"), first=True))[:800]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


def test_its_groups_are_a_window_and_all(engine: Engine) -> None:
    sliding, full = sorted(token_groups(engine.info.groups), key=lambda group: group.name, reverse=True)
    assert isinstance(sliding, SlidingKV) and sliding.window == WINDOW
    assert (sliding.num_layers, full.num_layers, sliding.dtype) == (15, 3, "bfloat16")


def test_what_comes_from_disk_says_what_the_parent_says_wherever_it_is_cut(
    engine: Engine, lab: Lab, text: tuple[int, ...]
) -> None:
    """A session reads a text in pieces that end at twenty random tokens and around the window's edge, and is committed
    at each; twins of it stay, as parents."""
    cuts = sorted({*random.Random(3).sample(range(2, len(text)), 20), WINDOW - 1, WINDOW, WINDOW + 1})
    session, at = engine.open(seed=SEED), 0
    captures: list[Captured] = []
    for cut in cuts:
        engine.append(session, text[at:cut]).result(LIMIT_S)
        at = cut
        captures.append(lab.capture(engine, session, captures[-1].num_kv if captures else 0))
        restored = lab.hydrate(engine, lab.plan(captures[-1], *captures[:-1]))
        assert restored.proof.num_cached_tokens == cut - 1
        live = lab.one(engine, lab.twin(engine, session), greedy(2))
        same(live, lab.one(engine, restored.session, greedy(2)))
        engine.close_session(restored.session)
    share = 3 * 2 * 256 * 2 * len(text) + 15 * 2 * 256 * 2 * len(text) * min(1, (WINDOW + 255) / len(text))
    whole = engine.open(seed=SEED)
    engine.append(whole, text).result(LIMIT_S)
    last = lab.capture(engine, whole)
    assert share * 0.6 < kv_nbytes(last) <= 1.03 * share
    with pytest.raises(NotKept, match=r"after 199 tokens the group sliding needs tokens 0 to 198"):
        lab.fork(engine, lab.hydrate(engine, lab.plan(last)).session, at=200)
    lab.fork(engine, whole, at=200)


def test_negative_control_another_texts_window_changes_the_logprobs(
    engine: Engine, lab: Lab, text: tuple[int, ...]
) -> None:
    import msgspec

    plans = []
    for tokens in (text[:600], text[200:800]):
        session = engine.open(seed=SEED)
        engine.append(session, tokens).result(LIMIT_S)
        plans.append(lab.plan(lab.capture(engine, session)))
    plan, strange = plans
    right = lab.one(engine, lab.hydrate(engine, plan).session, greedy(1))
    for group in ("sliding", "full"):
        slices = tuple(
            msgspec.structs.replace(mine, blobs={**mine.blobs, group: theirs.blobs[group]})
            if group in mine.blobs
            else mine
            for mine, theirs in zip(plan.slices, strange.slices, strict=True)
        )
        mixed = lab.hydrate(engine, msgspec.structs.replace(plan, slices=slices)).session
        assert bits(right.logprobs) != bits(lab.one(engine, mixed, greedy(1)).logprobs), group
