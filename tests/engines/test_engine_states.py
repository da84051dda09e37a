"""Models with recurrent layers on `transformers`: delta rules (GDN), Mamba2 and short convolutions, beside attention.

The law book on two of them; on all, equality with the stock model and its own cache, bit for bit, at points that were
asked for ahead; and controls that must show: a state of a token more or less, a sibling's, channels in another order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache  # noqa: E402

from kind_models import BOTH, RECURRENT  # noqa: E402
from thaw.core.cache import point_groups  # noqa: E402
from thaw.core.sampling import Sampling  # noqa: E402
from thaw.engines import load_engine  # noqa: E402
from thaw.engines.base import Engine, SessionRef  # noqa: E402
from thaw.engines.embedded.pages import PagedKV  # noqa: E402
from thaw.engines.embedded.weights import WeightsWatch  # noqa: E402
from thaw.testing import EngineTests  # noqa: E402
from thaw.testing.laws.kit import SEED, Lab, Load, bits, greedy, ids, seeded  # noqa: E402
from thaw.testing.models import VOCAB_SIZE  # noqa: E402
from thaw.testing.plans import mount_at  # noqa: E402
from thaw.testing.resume_worker import ResumeJob, ResumeRound, run_fresh  # noqa: E402

MORE = pytest.mark.slow("the same on one more architecture")
QUICK = ("qwen3_next", "granitemoehybrid", "lfm2", "falcon_h1", "lfm3")
"""A delta rule, Mamba2, a short convolution, layers that attend and are recurrent, and windows beside states."""
ALL = [pytest.param(arch, marks=() if arch in QUICK else MORE) for arch in (*RECURRENT, *BOTH, "qwen3_5")]
"""The last is multimodal, as the checkpoints of Qwen3.5 are; its text part runs."""
PROMPT, ANSWER = 300, 24
PLACEHOLDER = 259
"""A token that stands for an image, where there are some: no model is to say it."""
NOISE_FACTOR = 100
"""How many times the noise of another batch shape a control must move a log probability."""


class RecurrentLaws(EngineTests):
    """Sessions go back 64 tokens here. In prompts states are kept where a test forks: `ASKED`."""

    changes_weights = True
    ASKED: ClassVar[dict[str, tuple[int, ...]]] = {
        "test_messages_stay_with_the_prompt_that_they_became": (6, 16),
        "test_the_parent_is_untouched_by_what_its_children_do": (279,),
        "test_a_child_that_went_its_own_way_is_cut_like_any_other": (279,),
        "test_a_point_inside_a_prompt_equals_any_other_fork_there": (99, 255, 256, 398),
        "test_a_live_child_computes_what_a_hydrated_one_does": (255, 399),
    }
    arch: ClassVar[str]
    dtype: ClassVar[str] = "float32"

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls, tiny_model: Callable[..., Path]) -> Load:
        folder = str(tiny_model(cls.arch, dtype=cls.dtype))
        return lambda **changes: load_engine("transformers", model=folder, **{"recent_points": 64, **changes})

    @pytest.fixture(autouse=True)
    def asking(self, request: pytest.FixtureRequest, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        points, opened = self.ASKED.get(request.node.originalname, ()), engine.open

        def open_and_ask(**options: Any) -> SessionRef:
            session = opened(**options)
            engine.keep_points(session, points, unaligned=True)
            return session

        monkeypatch.setattr(engine, "open", open_and_ask)

    def change_weights(self, engine: Engine) -> None:
        with torch.no_grad():
            next(p for p in engine._backend._module.parameters() if p.ndim == 2).mul_(-1.0)  # type: ignore[attr-defined]

    def guard_off(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(WeightsWatch, "_look", lambda self: None)


class TestLawsOfADeltaRule(RecurrentLaws):
    arch = "qwen3_next"


class TestLawsOfMamba2(RecurrentLaws):
    arch, dtype = "granitemoehybrid", "bfloat16"


class Stock:
    """The stock model with its own cache, fed as thaw feeds it."""

    def __init__(self, folder: Path) -> None:
        made = AutoModelForImageTextToText if folder.name.startswith("qwen3_5-") else AutoModelForCausalLM
        self.module = made.from_pretrained(str(folder)).eval()
        self.bias = torch.zeros(VOCAB_SIZE)
        self.bias[PLACEHOLDER] = -100.0

    @torch.inference_mode()
    def feed(self, tokens: Sequence[int], start: int, cache: DynamicCache) -> Any:
        """Log probabilities after `tokens`, which follow `start` others in `cache`."""
        ids, positions = torch.tensor([list(tokens)]), torch.arange(start, start + len(tokens))[None]
        out = self.module(ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return torch.log_softmax(out.logits[0, -1].float(), -1)

    def greedy(self, tokens: Sequence[int], cuts: Sequence[int], count: int) -> tuple[tuple[int, ...], list[str]]:
        """`count` likeliest tokens and their log probabilities; the prompt is read up to each cut by itself."""
        cache, at = DynamicCache(config=self.module.config), 0
        for cut in (*cuts, len(tokens) - 1, len(tokens)):
            if cut > at:
                row, at = self.feed(tokens[at:cut], at, cache), cut
        chosen, logprobs = [], []
        for _ in range(count):
            chosen.append(int((row + self.bias).argmax()))
            logprobs.append(float(row[chosen[-1]]))
            row = self.feed(chosen[-1:], len(tokens) + len(chosen) - 1, cache)
        return tuple(chosen), bits(logprobs)


@pytest.fixture(params=ALL)
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(arch: str, tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(arch)


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with load_engine("transformers", model=str(folder)) as running:
        yield running


@pytest.fixture
def other(folder: Path) -> Iterator[Engine]:
    with load_engine("transformers", model=str(folder)) as running:
        yield running


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


def asked(engine: Engine, points: Sequence[int], count: int = PROMPT, *, start: int = 0) -> SessionRef:
    """A session that has read `count` tokens, with states after `points`."""
    session = engine.open(seed=SEED)
    engine.keep_points(session, points, unaligned=True)
    engine.append(session, ids(count, start)).result()
    return session


def _said(count: int) -> Sampling:
    """The likeliest tokens that are text; log probabilities are the model's own."""
    return greedy(count, logit_bias={PLACEHOLDER: -100.0})


def kv_of(engine: Engine, session: SessionRef) -> PagedKV:
    kv: PagedKV = engine._get(session).kv  # type: ignore[attr-defined]
    return kv


def test_twenty_random_cuts_equal_the_stock_model_that_stopped_there_too(
    arch: str, folder: Path, engine: Engine, other: Engine, lab: Lab
) -> None:
    """Ten points in a prompt and ten tokens of an answer, each from disk into another engine: what follows has the
    bits of the stock model with its own cache."""
    dice = random.Random(arch)
    points = sorted(dice.sample(range(1, PROMPT - 1), 10))
    tokens = ids(PROMPT)
    expected, logprobs = Stock(folder).greedy(tokens, points, ANSWER)
    session = asked(engine, points)
    captured = lab.capture(engine, session)
    whole = lab.one(engine, lab.twin(engine, session), _said(ANSWER))
    assert (whole.token_ids, bits(whole.logprobs)) == (expected, logprobs)
    for point in points:
        restored = lab.hydrate(other, lab.plan(captured, at=point + 1)).session
        assert other.view(restored).num_kv == point
        later = [p for p in points if p > point]
        other.keep_points(restored, later, unaligned=True)
        # the last token before the cut runs by itself there, so it does in the parent that is compared
        out = lab.one(other, restored, _said(ANSWER), tokens[point + 1 :])
        assert out.num_cached_tokens == point and out.usage.num_prefilled_tokens == PROMPT - point
        assert (out.token_ids, bits(out.logprobs)) == (expected, logprobs), point
    for cut in dice.sample(range(1, ANSWER), 10):
        part = lab.twin(engine, session)
        lab.one(engine, part, _said(cut))
        rest = lab.one(other, lab.move(engine, part, other), _said(ANSWER - cut))
        assert rest.usage.num_prefilled_tokens == 1
        assert bits(rest.logprobs) == logprobs[cut:], cut


def test_an_answer_that_is_cut_in_the_middle_goes_on_in_a_new_process(
    folder: Path, engine: Engine, lab: Lab, tmp_path: Path
) -> None:
    session = asked(engine, [64])
    whole = lab.one(engine, lab.twin(engine, session), seeded(ANSWER))
    captured, uncut = lab.captured_amid(engine, session, samplings=[seeded(400), seeded(1500)])
    rounds = (
        ResumeRound(plans=(lab.plan(captured),)),
        ResumeRound(plans=(lab.plan(lab.capture(engine, session)),), sampling=seeded(ANSWER)),
    )
    job = ResumeJob(engine="transformers", options={"model": str(folder)}, rounds=rounds)
    amid, end = (round.completions[0] for round in run_fresh(job, tmp_path).rounds)
    assert (amid.token_ids, list(amid.logprobs)) == (uncut.token_ids, bits(uncut.logprobs))
    assert (end.token_ids, list(end.logprobs)) == (whole.token_ids, bits(whole.logprobs))


def test_controls_that_can_see(folder: Path, engine: Engine, lab: Lab) -> None:
    """The state of one token more or less, a sibling's, and channels in another order, part by part: each moves the
    next log probabilities by 100 times what another shape of the passes does."""
    point, tokens = 256, ids(PROMPT)
    stock = Stock(folder)
    noise = max(
        float((_after(stock, tokens, cuts) - _after(stock, tokens, [PROMPT - 1])).abs().max())
        for cuts in ([64], [100, 200], [point], [1])
    )
    session = asked(engine, [point - 1, point, point + 1])
    sibling = asked(engine, [point], start=3)
    right = _next(engine, lab, session, point)
    assert torch.equal(right, _next(engine, lab, session, point))
    own, parts = kv_of(engine, session).points, _parts(engine)
    strangers = {"n-1": own[point - 1], "n+1": own[point + 1], "sibling": kv_of(engine, sibling).points[point]}
    moved = {}
    for name, begin, end in parts:
        for what, stranger in strangers.items():
            state = (*own[point][:begin], *stranger[begin:end], *own[point][end:])
            moved[f"{name} of {what}"] = _far(right, _next(engine, lab, session, point, state))
        if name.startswith("conv"):
            swapped = [_channels_reversed(bytes(blob), engine, name) for blob in own[point][begin:end]]
            state = (*own[point][:begin], *swapped, *own[point][end:])
            moved[f"{name} in another order"] = _far(right, _next(engine, lab, session, point, state))
    weak = {what: far for what, far in moved.items() if not far >= NOISE_FACTOR * max(noise, 1e-7)}
    assert not weak, f"noise {noise:.2g}"
    assert len(moved) >= 4


def _after(stock: Stock, tokens: Sequence[int], cuts: Sequence[int]) -> Any:
    cache, at = DynamicCache(config=stock.module.config), 0
    for cut in (*cuts, len(tokens)):
        row, at = stock.feed(tokens[at:cut], at, cache), cut
    return row


def _parts(engine: Engine) -> list[tuple[str, int, int]]:
    """Each part of the model's states, and its blobs among all."""
    out, at = [], 0
    for group in point_groups(engine.info.groups):
        for part in group.parts:
            out.append((part.name, at, at + part.num_heads))
            at += part.num_heads
    return out


def _next(engine: Engine, lab: Lab, session: SessionRef, point: int, state: Any = None) -> Any:
    """All log probabilities after token `point` and two more, from this state."""
    child = lab.twin(engine, session, at=point + 1)
    if state is not None:
        kv_of(engine, child).points[point] = state
    engine.append(child, (5,)).result()
    logits = engine._backend.logits([engine._get(child).row])  # type: ignore[attr-defined]
    engine.close_session(child)
    return torch.log_softmax(logits[0], -1)


def _far(right: Any, wrong: Any) -> float:
    return float((right - wrong).abs().max())


def _channels_reversed(blob: bytes, engine: Engine, name: str) -> bytes:
    group = point_groups(engine.info.groups)[0]
    part = next(part for part in group.parts if part.name == name)
    values = torch.frombuffer(bytearray(blob), dtype=getattr(torch, part.dtype)).view(group.num_layers, *part.shape)
    return bytes(values.flip(1).contiguous().view(-1).view(torch.uint8).numpy())
