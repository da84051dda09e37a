"""Cache kinds on `transformers`, each on a small random model: the law book, the stock model as oracle, and controls.

Models of `KINDS` run with their own attention, one session a pass. A feed of theirs must give the logits that the stock
model gives with a cache of its own for the same feeds, bit for bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, DynamicCache  # noqa: E402

import thaw  # noqa: E402
from kind_models import KINDS, PARTS, WINDOW  # noqa: E402
from thaw.core.cache import SlidingKV, columns, token_groups  # noqa: E402
from thaw.core.errors import NotKept, Unsupported  # noqa: E402
from thaw.core.ids import digest  # noqa: E402
from thaw.engines import load_engine  # noqa: E402
from thaw.engines.base import Captured, Engine  # noqa: E402
from thaw.engines.embedded.backend import Feed  # noqa: E402
from thaw.engines.embedded.pages import PagedKV  # noqa: E402
from thaw.engines.embedded.weights import WeightsWatch  # noqa: E402
from thaw.engines.hf.groups import KV  # noqa: E402
from thaw.testing import EngineTests, ExactnessTests  # noqa: E402
from thaw.testing.laws.bytes_law import blob_ids, kv_nbytes  # noqa: E402
from thaw.testing.laws.groups_law import GroupsLaw  # noqa: E402
from thaw.testing.laws.kit import Lab, Load, greedy, ids, same, seeded  # noqa: E402
from thaw.testing.laws.proof_law import ProofLaw  # noqa: E402
from thaw.testing.plans import mount_at  # noqa: E402
from thaw.testing.resume_worker import ResumeJob, ResumeRound, answer, run_fresh  # noqa: E402

WINDOWED = [kind for kind, what in KINDS.items() if "windows" in what or "chunks" in what]
QUICK = {"gpt_oss", "gemma4_text", "deepseek_v3", "qwen2_5_vl"}
CUTS = sorted({*random.Random(19).sample(range(2, 700), 20), 255, 256, 257, WINDOW - 1, WINDOW, WINDOW + 1})
POWER = 100
"""How many times more than the noise of a pass's shape a control must move a log probability."""


def some(kinds: Sequence[str]) -> list[Any]:
    more = pytest.mark.slow("the same on one more model of the kind")
    return [pytest.param(kind, marks=() if kind in QUICK else more) for kind in kinds]


def factory(folder: Path, **options: Any) -> Load:
    return lambda **changes: load_engine("transformers", model=str(folder), **{**options, **changes})


@pytest.mark.slow("the whole law book on one more kind of cache")
class TestEveryLawOfWindows(EngineTests):
    """With windows kept of all tokens, so that the laws of earlier tokens apply."""

    changes_weights = True

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls, tiny_model: Callable[..., Path]) -> Load:
        return factory(tiny_model("gpt_oss"), interior=True)

    def change_weights(self, engine: Engine) -> None:
        with torch.no_grad():
            engine._backend._module.get_input_embeddings().weight.mul_(-1.0)  # type: ignore[attr-defined]

    def guard_off(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(WeightsWatch, "_look", lambda self: None)


@pytest.mark.slow("the same laws on other models, in the other dtype")
class TestExactnessOfKinds(ExactnessTests):
    @pytest.fixture(scope="class", params=["deepseek_v3", "falcon"])
    @classmethod
    def engine_factory(cls, request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Load:
        return factory(tiny_model(request.param, dtype="bfloat16"))


class TestWindowsOfTheEnd(GroupsLaw, ProofLaw):
    """What an engine keeps by default: of layers with a window the last tokens alone."""

    @pytest.fixture(scope="class", params=some(WINDOWED))
    @classmethod
    def engine_factory(cls, request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Load:
        return factory(tiny_model(request.param))

    def test_an_earlier_token_is_refused_by_name_and_a_turns_end_is_not(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 300)
        name = next(group.name for group in engine.info.groups if isinstance(group, SlidingKV))
        assert "interior-points" not in engine.info.capabilities
        with pytest.raises(NotKept, match=f"after 99 tokens the group {name}.*`reread`"):
            lab.fork(engine, session, at=100)
        assert engine.view(engine.reread(session, 100).result()).num_kv == 100
        lab.fork(engine, session, at=300)

    @pytest.mark.parametrize("count", [1, 39, 40, 41, 256, 257, 700])
    def test_restored_bytes_equal_captured_bytes(self, engine: Engine, other: Engine, lab: Lab, count: int) -> None:
        session = lab.begin(engine, count)
        first = lab.capture(engine, session)
        restored = lab.hydrate(other, lab.plan(first)).session
        assert blob_ids(lab.capture(other, restored)) == blob_ids(first)
        assert other.park(restored).result().parked and blob_ids(lab.capture(other, restored)) == blob_ids(first)
        same(lab.one(engine, session, seeded(6), (1,)), lab.one(other, restored, seeded(6), (1,)))

    def test_a_cut_in_the_middle_of_generating_resumes_bit_for_bit(
        self, engine: Engine, other: Engine, lab: Lab
    ) -> None:
        captured, whole = lab.captured_amid(engine, lab.begin(engine, 250))
        assert captured.num_kv > 255
        same(whole, lab.resume(other, lab.hydrate(other, lab.plan(captured)).session)[0])

    def test_twenty_turns_write_their_own_tokens_and_the_last_goes_on_like_its_parent(
        self, engine: Engine, other: Engine, lab: Lab
    ) -> None:
        session = lab.begin(engine, 250)
        captures: list[Captured] = []
        for turn in range(20):
            lab.one(engine, session, seeded(3), ids(4, 9 + turn))
            captures.append(lab.capture(engine, session, captures[-1].num_kv if captures else 0))
        plan = lab.plan(captures[-1], *captures[:-1])
        same(lab.one(engine, session, seeded(8)), lab.one(other, lab.hydrate(other, plan).session, seeded(8)))

    @pytest.mark.parametrize("count", [100, 1000, 3000])
    def test_a_snapshot_is_as_large_as_its_groups_shares(self, engine: Engine, lab: Lab, count: int) -> None:
        """At most 3 % over the full groups' bytes and, of a window, those of window + 255 tokens."""
        nbytes = kv_nbytes(lab.capture(engine, lab.begin(engine, count)))
        groups = token_groups(engine.info.groups)
        shares = [(g.token_nbytes * count, 1 if not isinstance(g, SlidingKV) else min(1, (g.window + 255) / count))
                  for g in groups]  # fmt: skip
        assert nbytes <= 1.03 * sum(whole * share for whole, share in shares)


class Oracle:
    """The stock model, with a cache of its own, by the feeds that an engine of thaw's got."""

    def __init__(self, folder: Path) -> None:
        config = AutoConfig.from_pretrained(folder)
        kind: Any = AutoModelForImageTextToText if config.model_type in PARTS else AutoModelForCausalLM
        self.module = kind.from_pretrained(str(folder)).eval()

    def after(self, feeds: Sequence[Sequence[int]]) -> Any:
        """The float32 logits after the last of them, [vocabulary]."""
        cache, out = DynamicCache(config=self.module.config), None
        with torch.inference_mode():
            for feed in feeds:
                ids_ = torch.tensor([list(feed)])
                out = self.module(input_ids=ids_, past_key_values=cache, use_cache=True, logits_to_keep=1)
            assert out is not None
            return out.logits[0, -1].float()


@pytest.fixture(scope="module", params=some([*KINDS, *PARTS]))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(kind)


@pytest.fixture(scope="module")
def engines(folder: Path) -> Iterator[tuple[Engine, Engine]]:
    load = factory(folder)
    with load() as one, load() as two:
        yield one, two


@pytest.fixture
def feeds(engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of each pass of the first engine, in order."""
    seen: list[list[int]] = []
    own = engines[0]._backend.forward  # type: ignore[attr-defined]

    def forward(feeds: Sequence[Feed]) -> list[Any]:
        seen.extend(list(feed.tokens) for feed in feeds)
        rows: list[Any] = own(feeds)
        return rows

    monkeypatch.setattr(engines[0]._backend, "forward", forward)  # type: ignore[attr-defined]
    return seen


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


def test_the_stock_model_gives_the_same_logits_for_the_same_feeds(
    folder: Path, engines: tuple[Engine, Engine], feeds: list[list[int]], lab: Lab
) -> None:
    """In a prefill of several chunks, where a session goes on, and in each token of a decode. The control: the logits
    of one token earlier."""
    engine, oracle = engines[0], Oracle(folder)
    session = lab.begin(engine, 2500)
    for prompt, sampling in (((5, 6, 7), greedy(1)), (ids(300, 3), greedy(1)), ((), greedy(1)), ((), greedy(7))):
        lab.one(engine, session, sampling, prompt)
        taken = lab.capture(engine, session)
        assert taken.boundary is not None and taken.boundary.digest == digest(oracle.after(feeds).numpy().tobytes())
    assert taken.boundary is not None and taken.boundary.digest != digest(oracle.after(feeds[:-1]).numpy().tobytes())
    assert sum(map(len, feeds)) == taken.num_kv


def test_a_cut_anywhere_continues_like_the_uninterrupted_parent(engines: tuple[Engine, Engine], lab: Lab) -> None:
    engine, other = engines
    for count in CUTS:
        session = lab.begin(engine, count, start=count)
        moved = lab.move(engine, session, other)
        whole = lab.one(engine, session, seeded(6), (5,))
        same(whole, lab.one(other, moved, seeded(6), (5,)))
        for ref, owner in ((session, engine), (moved, other)):
            owner.close_session(ref)


def test_a_cut_in_the_middle_of_generating_continues_like_the_uninterrupted_parent(
    engines: tuple[Engine, Engine], lab: Lab
) -> None:
    engine, other = engines
    for count in (30, 250):
        captured, whole = lab.captured_amid(engine, lab.begin(engine, count))
        same(whole, lab.resume(other, lab.hydrate(other, lab.plan(captured)).session)[0])


def test_the_bits_of_a_session_do_not_depend_on_the_batch(engines: tuple[Engine, Engine], lab: Lab) -> None:
    engine, _ = engines
    session = lab.begin(engine, 300)
    alone = lab.one(engine, lab.twin(engine, session), greedy(8), (5,))
    beside = [lab.begin(engine, count, start=count) for count in (20, 700)]
    same(alone, lab.run(engine, lab.twin(engine, session), *beside, sampling=greedy(8), prompt=(5,))[0])


@pytest.mark.slow("boots the engine in another process")
def test_a_new_process_continues_bit_for_bit(
    folder: Path, engines: tuple[Engine, Engine], lab: Lab, tmp_path: Path
) -> None:
    engine, _ = engines
    sessions = [lab.begin(engine, count) for count in (41, 256, 301)]
    plans = [lab.plan(lab.capture(engine, session)) for session in sessions]
    rounds = tuple(ResumeRound(plans=(plan,), sampling=seeded(8), prompt=(5,)) for plan in plans)
    report = run_fresh(ResumeJob(engine="transformers", options={"model": str(folder)}, rounds=rounds), tmp_path)
    for session, done in zip(sessions, report.rounds, strict=True):
        own, theirs = answer(lab.one(engine, session, seeded(8), (5,))), done.completions[0]
        assert (own.token_ids, own.logprobs) == (theirs.token_ids, theirs.logprobs)


class Controls:
    """A backend's passes over caches that are wrong on purpose, against the right one."""

    def __init__(self, engine: Engine, oracle: Oracle, count: int) -> None:
        self.backend: Any = engine._backend  # type: ignore[attr-defined]
        self.count, self.tokens, self.others = count, list(ids(count + 1)), list(ids(count, 77))
        self.right = self.after(self.filled(self.tokens[:-1]))
        halves = [self.tokens[: count // 2], self.tokens[count // 2 : -1], self.tokens[-1:]]
        shapes = [
            self.logprobs(oracle.after(parts))
            for parts in (halves, [self.tokens], [self.tokens[:-1], self.tokens[-1:]])
        ]
        self.noise = max(float((one - two).abs().max()) for one in shapes for two in shapes)

    @staticmethod
    def logprobs(logits_V: Any) -> Any:
        return torch.log_softmax(logits_V.double(), -1)

    def filled(self, tokens: Sequence[int]) -> PagedKV:
        kv = PagedKV(self.backend)
        kv.reserve(len(tokens) + 1)
        self.backend.forward([Feed(kv, tokens)])
        return kv

    def after(self, kv: PagedKV) -> Any:
        """Log probabilities after the last token on top of `kv`."""
        return self.logprobs(self.backend.logits(self.backend.forward([Feed(kv, self.tokens[-1:])]))[0])

    def moved(self, kv: PagedKV) -> float:
        """How far a wrong cache moves a log probability."""
        return float((self.after(kv) - self.right).abs().max())

    def of_another(self, group: str, start: int, stop: int) -> PagedKV:
        """The cache with a group's KV of another session in tokens [start, stop) of one page."""
        kv, other = self.filled(self.tokens[:-1]), self.filled(self.others)
        for index, column in enumerate(columns(self.backend.groups)):
            if column.group.name == group:
                kv.write(index, start, stop, memoryview(bytes(other.read(index, start, stop))), stop - start)
        return kv


def test_controls_that_can_see(folder: Path, engines: tuple[Engine, Engine]) -> None:
    """A foreign hit (a page of another session), all of another session, and of a window its first token from another
    session and a window one token short: each moves a log probability by far more than the shape of a pass does."""
    count = 350
    controls = Controls(engines[0], Oracle(folder), count)
    moved = {"all of another session": controls.moved(controls.filled(controls.others))}
    for group in token_groups(engines[0].info.groups):
        needed = group.covers(count)
        moved[f"{group.name}: the last page"] = controls.moved(
            controls.of_another(group.name, max(256, needed.start), count)
        )
        if needed.start == 0:
            moved[f"{group.name}: the first page"] = controls.moved(controls.of_another(group.name, 0, 256))
            continue
        first = needed.start if "llama4" not in str(folder) else count // 64 * 64  # a chunk's first token
        moved[f"{group.name}: the first token"] = controls.moved(controls.of_another(group.name, first, first + 1))
        moved[f"{group.name}: a window one token short"] = _window_one_short(controls)
    blind = {what: value for what, value in moved.items() if value < max(POWER * controls.noise, 1e-9)}
    assert blind == {}, (controls.noise, moved)
    print({what: f"{value:.2g}" for what, value in moved.items()}, f"noise {controls.noise:.2g}")


def _window_one_short(controls: Controls) -> float:
    """The pass whose windowed layers are given a cache of one token less."""
    kv, runner = controls.filled(controls.tokens[:-1]), controls.backend._pass
    own = runner._places
    runner._places = [
        [
            (g, row, spec._replace(window=spec.window - 1) if isinstance(spec, KV) and spec.window else spec)
            for g, row, spec in of
        ]
        for of in own
    ]
    try:
        return controls.moved(kv)
    finally:
        runner._places = own


@pytest.mark.parametrize("arch", PARTS)
def test_an_image_in_a_session_is_refused_by_name(arch: str, tiny_model: Callable[..., Path], lab: Lab) -> None:
    """Its placeholder, in an append and in a prompt; the session goes on without it."""
    with load_engine("transformers", model=str(tiny_model(arch))) as engine:
        session = lab.begin(engine, 20)
        for ask in (
            lambda: engine.append(session, (5, 259, 6)).result(),
            lambda: lab.one(engine, session, greedy(2), (259,)),
        ):
            with pytest.raises(Unsupported, match="259 is the model's image_token_i"):
                ask()
        assert len(lab.one(engine, session, greedy(2), (5, 6)).token_ids) == 2


def test_an_attached_multimodal_module_runs_its_text_part(tiny_model: Callable[..., Path], lab: Lab) -> None:
    folder = tiny_model("gemma3")
    oracle = Oracle(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with thaw.attach(oracle.module, tokenizer=tokenizer) as engine, factory(folder)() as booted:
        sessions = [(one, lab.begin(one, 300)) for one in (engine, booted)]
        same(*(lab.one(one, session, greedy(6), (5,)) for one, session in sessions))
        assert engine.identity() == booted.identity()
