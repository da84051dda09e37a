"""Gemma 3 270M, weights that somebody trained: 15 layers with a window of 512 tokens and 3 that attend to all.

Its weights come from a 4-bit file and are dequantised to bfloat16 (`gemma_model.py`). What thaw does with it is
compared with transformers' own class and its own cache, which get the same tokens in the same passes: bit for bit.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, DynamicCache  # noqa: E402

from gemma_model import ensure_gemma  # noqa: E402
from thaw.core.cache import SlidingKV, columns, token_groups  # noqa: E402
from thaw.core.errors import NotKept  # noqa: E402
from thaw.core.ids import digest  # noqa: E402
from thaw.demo.model import DemoModelError  # noqa: E402
from thaw.engines import load_engine  # noqa: E402
from thaw.engines.base import Captured, Engine, SessionRef  # noqa: E402
from thaw.testing.laws.bytes_law import kv_nbytes  # noqa: E402
from thaw.testing.laws.kit import SEED, Lab, bits, greedy  # noqa: E402
from thaw.testing.plans import mount_at  # noqa: E402
from thaw.testing.resume_worker import ResumeJob, ResumeRound, run_fresh  # noqa: E402

pytestmark = pytest.mark.model("Gemma 3 270M, fetched and converted once")
WINDOW = 512
EDGE = (WINDOW - 1, WINDOW, WINDOW + 1)
ANSWER = 2
"""Tokens that are generated at each cut."""
PROSE = Path(__file__).parents[2] / "docs" / "architecture.md"


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return ensure_gemma()
    except DemoModelError as error:
        pytest.skip(f"Gemma 3 270M cannot be had here: {error}")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with load_engine("transformers", model=str(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def other(folder: Path) -> Iterator[Engine]:
    with load_engine("transformers", model=str(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def text(engine: Engine) -> tuple[int, ...]:
    """English, as the model's own tokens, with the token that starts a text."""
    return tuple(engine.codec.encode(PROSE.read_text("utf-8"), first=True))[:800]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


class Stock:
    """transformers' own model and cache; `row` are the logits after all tokens so far."""

    def __init__(self, folder: Path) -> None:
        self.module = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
        self.cache = DynamicCache(config=self.module.config)
        self.row: Any = None

    def read(self, tokens: Sequence[int]) -> None:
        """As thaw reads them: the last token in a pass by itself."""
        for part in (tokens[:-1], tokens[-1:]):
            if part:
                self.feed(part)

    @torch.inference_mode()
    def feed(self, tokens: Sequence[int]) -> None:
        out = self.module(torch.tensor([list(tokens)]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.row = out.logits[0, -1].float()

    def child(self) -> Stock:
        """transformers' way to continue twice: the cache is copied."""
        child = copy.copy(self)
        child.cache = copy.deepcopy(self.cache)
        return child

    def greedy(self, count: int) -> tuple[tuple[int, ...], list[str]]:
        chosen, logprobs = [], []
        for _ in range(count):
            row = torch.log_softmax(self.row, -1)
            chosen.append(int(row.argmax()))
            logprobs.append(float(row[chosen[-1]]))
            self.feed(chosen[-1:])
        return tuple(chosen), bits(logprobs)


def continued(lab: Lab, engine: Engine, session: SessionRef) -> tuple[tuple[int, ...], list[str]]:
    out = lab.one(engine, session, greedy(ANSWER))
    engine.close_session(session)
    return out.token_ids, bits(out.logprobs)


def test_the_tokens_and_the_weights_are_those_of_a_trained_model(engine: Engine, text: tuple[int, ...]) -> None:
    """The text comes back, and is far likelier than chance, which is -12.5 a token."""
    assert engine.codec.decode(text[1:]) in PROSE.read_text("utf-8")
    session = engine.open(seed=SEED)
    likely = 0
    for at in range(0, 200, 10):
        engine.append(session, text[at : at + 10]).result()
        backend: Any = engine._backend  # type: ignore[attr-defined]
        row = torch.log_softmax(backend.logits([engine._get(session).row])[0], -1)  # type: ignore[attr-defined]
        likely += float(row[text[at + 10]]) > -6
    engine.close_session(session)
    assert likely >= 10, likely


def test_forks_and_hydrates_at_random_cuts_equal_the_stock_model_with_its_own_cache(
    engine: Engine, other: Engine, lab: Lab, folder: Path, text: tuple[int, ...], tmp_path: Path
) -> None:
    """A session reads a text in pieces that end at twenty random tokens and around the window's edge. At each end the
    logits are the stock model's, and so is what a live child and one from disk say; and, at three ends, a new
    process."""
    cuts = sorted({*random.Random(3).sample(range(2, len(text)), 20), *EDGE})
    session, stock, at = engine.open(seed=SEED), Stock(folder), 0
    captures: list[Captured] = []
    expected = {}
    for cut in cuts:
        engine.append(session, text[at:cut]).result()
        stock.read(text[at:cut])
        at = cut
        captures.append(lab.capture(engine, session, captures[-1].num_kv if captures else 0))
        boundary = captures[-1].boundary
        assert boundary is not None and boundary.digest == digest(stock.row.numpy().tobytes()), cut
        expected[cut] = stock.child().greedy(ANSWER)
        restored = lab.hydrate(other, plan_of(lab, captures)).session
        assert other.view(restored).num_kv == cut
        assert continued(lab, engine, lab.twin(engine, session)) == expected[cut], cut
        assert continued(lab, other, restored) == expected[cut], cut
    plans = [plan_of(lab, captures[: cuts.index(cut) + 1]) for cut in EDGE]
    rounds = tuple(ResumeRound(plans=(plan,), sampling=greedy(ANSWER)) for plan in plans)
    report = run_fresh(ResumeJob(engine="transformers", options={"model": str(folder)}, rounds=rounds), tmp_path)
    for cut, done in zip(EDGE, report.rounds, strict=True):
        (out,) = done.completions
        assert (out.token_ids, list(out.logprobs)) == expected[cut], cut
    engine.close_session(session)


def plan_of(lab: Lab, captures: Sequence[Captured]) -> Any:
    return lab.plan(captures[-1], *captures[:-1])


def test_an_answer_that_is_cut_while_the_window_moves_equals_the_stock_models(
    engine: Engine, other: Engine, lab: Lab, folder: Path, text: tuple[int, ...]
) -> None:
    """Its tokens 508 to 516 are generated. It is cut after each of them, by its end, and continues from disk."""
    session, stock = engine.open(seed=SEED), Stock(folder)
    engine.append(session, text[:508]).result()
    stock.read(text[:508])
    said, logprobs = stock.greedy(8 + ANSWER)
    for cut in range(8):
        restored = lab.move(engine, session, other)
        out = lab.one(other, restored, greedy(ANSWER))
        assert (out.token_ids, bits(out.logprobs)) == (said[cut : cut + ANSWER], logprobs[cut : cut + ANSWER]), cut
        assert out.usage.num_prefilled_tokens == (0 if cut == 0 else 1)
        other.close_session(restored)
        assert bits(lab.one(engine, session, greedy(1)).logprobs) == logprobs[cut : cut + 1]
    engine.close_session(session)


def test_the_windows_are_a_share_of_a_snapshot_and_an_earlier_token_is_refused(
    engine: Engine, lab: Lab, text: tuple[int, ...]
) -> None:
    session = engine.open(seed=SEED)
    engine.append(session, text).result()
    with pytest.raises(NotKept, match="after 599 tokens the group sliding"):
        lab.fork(engine, session, at=600)
    full, sliding = 3 * 2 * 256 * 2 * len(text), 15 * 2 * 256 * 2 * len(text)
    share = full + sliding * min(1, (WINDOW + 255) / len(text))
    assert share * 0.7 < kv_nbytes(lab.capture(engine, session)) <= 1.03 * share
    engine.close_session(session)


def test_controls_that_can_see(engine: Engine, text: tuple[int, ...]) -> None:
    """After 600 tokens: one token of another text, the first that the window still has or one that only the full layers
    have, and a window one token short: each changes bits. A token behind the window, in the windowed layers: none."""
    right = after(engine, text)
    assert torch.equal(right, after(engine, text))
    first = 599 - WINDOW + 1
    changed = {
        "the window's first token": after(engine, text, ("sliding", first)),
        "a token of the full layers": after(engine, text, ("full", 3)),
        "a window one token short": after(engine, text, short=True),
    }
    assert [what for what, row in changed.items() if torch.equal(row, right)] == []
    assert torch.equal(after(engine, text, ("sliding", first - 1)), right)


def after(engine: Engine, text: tuple[int, ...], strange: tuple[str, int] | None = None, *, short: bool = False) -> Any:
    """The logits after 600 tokens, the last of which is read over a cache that is wrong in one way."""
    session, stranger = engine.open(seed=SEED), engine.open(seed=SEED)
    engine.append(session, text[:599]).result()
    kv = engine._get(session).kv  # type: ignore[attr-defined]
    if strange is not None:
        name, token = strange
        engine.append(stranger, text[300:600]).result()
        other = engine._get(stranger).kv  # type: ignore[attr-defined]
        for index, column in enumerate(columns(engine.info.groups)):
            if column.group.name == name:
                kv.write(index, token, token + 1, memoryview(bytes(other.read(index, token, token + 1))), 1)
    runner: Any = engine._backend._pass  # type: ignore[attr-defined]
    own = runner._places
    try:
        if short:
            runner._places = [
                [(g, row, spec._replace(window=spec.window - 1) if spec.window else spec) for g, row, spec in of]
                for of in own
            ]
        engine.append(session, text[599:600]).result()
    finally:
        runner._places = own
    logits = engine._backend.logits([engine._get(session).row])[0]  # type: ignore[attr-defined]
    for ref in (session, stranger):
        engine.close_session(ref)
    return logits


def test_its_groups_are_a_window_and_all(engine: Engine) -> None:
    sliding, full = sorted(token_groups(engine.info.groups), key=lambda group: group.name, reverse=True)
    assert isinstance(sliding, SlidingKV) and sliding.window == WINDOW
    assert (sliding.num_layers, full.num_layers, sliding.dtype) == (15, 3, "bfloat16")
