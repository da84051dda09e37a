"""Resumed in a fresh process equals uninterrupted, bit for bit: quickly on `fake`, and on the real model.

One session, one worker: the parent's runs and every cut come first, then a fresh interpreter hydrates all of them from
the packs. The negative control goes through the same worker.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from thaw.core.sampling import Sampling
from thaw.demo import document
from thaw.engines import load_engine
from thaw.engines.base import Captured, Engine, HydratePlan, SessionRef
from thaw.testing.laws.boundary_law import stop_string
from thaw.testing.laws.kit import LIMIT_S, SEED, Lab, greedy, ids, seeded
from thaw.testing.plans import halves_swapped, mount_at, tampered
from thaw.testing.resume_worker import Report, ResumeAnswer, ResumeJob, ResumeRound, answer, run_fresh

PROMPT = (11, 5, 7)


@dataclass
class Story:
    """What the parent did, by name, and what the fresh process made of each cut."""

    lab: Lab
    engine: Engine
    session: SessionRef
    base: Captured
    expected: dict[str, list[ResumeAnswer]] = field(default_factory=dict)
    rounds: dict[str, ResumeRound] = field(default_factory=dict)
    report: Report | None = None

    def resumed(self, name: str, sampling: Sampling, cut: int) -> None:
        """A whole run, and the same run cut after `cut` tokens."""
        start = len(self.base.tokens)
        parent = self.lab.twin(self.engine, self.session)
        out = self.lab.one(self.engine, parent, sampling)
        assert len(out.token_ids) > cut
        self.expected[name] = [answer(out)]
        part = self.lab.twin(self.engine, parent, at=start + cut)
        self.rounds[name] = ResumeRound(plans=(self.plan(part),))

    def plan(self, session: SessionRef) -> HydratePlan:
        return self.lab.plan(self.lab.capture(self.engine, session, base=self.base.num_kv), self.base)

    def answers(self, name: str) -> tuple[ResumeAnswer, ...]:
        assert self.report is not None
        return self.report.rounds[list(self.rounds).index(name)].completions

    def tell(self, engine_name: str, options: dict[str, str | int], folder: Path) -> None:
        job = ResumeJob(engine=engine_name, options=options, rounds=tuple(self.rounds.values()))
        self.report = run_fresh(job, folder)


def every_knob(num_tokens: int) -> Sampling:
    return Sampling(
        temperature=1.0, top_p=0.95, top_k=80, min_p=0.001, repetition_penalty=1.1, presence_penalty=0.3,
        frequency_penalty=0.2, min_tokens=num_tokens, max_tokens=num_tokens, logprobs=4,
    )  # fmt: skip


def live(engine: Engine, tokens: tuple[int, ...], folder: Path) -> Story:
    """All that the parent does before the other process starts."""
    lab = Lab(mount_at(folder))
    session = engine.open(seed=SEED)
    engine.append(session, tokens).result(LIMIT_S)
    story = Story(lab, engine, session, lab.capture(engine, session))
    for style, sampling in (("greedy", greedy(12)), ("seeded", seeded(12)), ("knobs", every_knob(12))):
        twin = lab.twin(engine, session)
        story.expected[f"{style} from the start"] = [answer(lab.one(engine, twin, sampling))]
        story.rounds[f"{style} from the start"] = ResumeRound(plans=(lab.plan(story.base),), sampling=sampling)
        story.resumed(f"{style} after one", sampling, 1)
        story.resumed(f"{style} midway", sampling, 7)
    _stop_string(story)
    _while_running(story)
    _children(story)
    _wrong_block(story)
    return story


def _stop_string(story: Story) -> None:
    probe = story.lab.one(story.engine, story.lab.twin(story.engine, story.session), seeded(40))
    sampling = seeded(40, stop=(stop_string(probe),))
    whole = story.lab.one(story.engine, story.lab.twin(story.engine, story.session), sampling)
    assert whole.finish_reason == "stop"
    story.resumed("at a stop string", sampling, len(whole.token_ids) - 1)


def _while_running(story: Story) -> None:
    """Captured by this thread while the engine's decodes."""
    captured, whole = story.lab.captured_amid(story.engine, story.session, base=story.base.num_kv)
    story.expected["while running"] = [answer(whole)]
    story.rounds["while running"] = ResumeRound(plans=(story.lab.plan(captured, story.base),))


def _children(story: Story) -> None:
    children = story.lab.fork(story.engine, story.session, 4)
    outs = story.lab.run(story.engine, *children, sampling=seeded(12), prompt=PROMPT)
    assert len({out.token_ids for out in outs}) == 4
    story.expected["four children"] = [answer(out) for out in outs]
    story.rounds["four children"] = ResumeRound(
        plans=(story.lab.plan(story.base),), fork=4, prompt=PROMPT, sampling=seeded(12)
    )


def _wrong_block(story: Story) -> None:
    """The negative control: one block wrong, hashed again and so accepted."""
    wrong = tampered(story.lab.plan(story.base), halves_swapped, piece=len(story.base.segments) // 2)
    story.expected["wrong block"] = story.expected["greedy from the start"]
    story.rounds["wrong block"] = ResumeRound(plans=(wrong,), sampling=greedy(12))


CUTS = [
    *(
        f"{style} {place}"
        for style in ("greedy", "seeded", "knobs")
        for place in ("from the start", "after one", "midway")
    ),
    "at a stop string",
    "while running",
    "four children",
]


class FreshProcess:
    """The laws, on a `story` told by a subclass's fixture."""

    min_tokens = 300

    @pytest.mark.parametrize("name", CUTS)
    def test_resumed_in_a_fresh_process_equals_uninterrupted(self, story: Story, name: str) -> None:
        expected, found = story.expected[name], story.answers(name)
        assert len(expected) == len(found) > 0
        for one, two in zip(expected, found, strict=True):
            assert one.token_ids == two.token_ids
            assert one.logprobs == two.logprobs
            assert (one.text, one.finish_reason) == (two.text, two.finish_reason)

    def test_it_was_another_process_with_the_same_numerics(self, story: Story) -> None:
        assert story.report is not None
        assert story.report.pid != os.getpid()
        assert story.report.numerics == story.engine.info.numerics

    def test_nothing_was_prefilled_again(self, story: Story) -> None:
        assert story.report is not None and len(story.base.tokens) >= self.min_tokens
        for name, one in zip(story.rounds, story.report.rounds, strict=True):
            assert all(proof.hit and proof.num_cached_tokens >= len(story.base.tokens) for proof in one.proofs)
            prefilled = {out.num_prefilled_tokens for out in one.completions}
            assert prefilled <= ({len(PROMPT)} if "children" in name else {0, 1})

    def test_negative_control_one_wrong_block_changes_the_logprobs(self, story: Story) -> None:
        right, wrong = story.expected["wrong block"][0], story.answers("wrong block")[0]
        assert right.logprobs[0] == wrong.logprobs[0], "the first is of the stored hidden state, which was not touched"
        assert right.logprobs[1] != wrong.logprobs[1]

    def test_every_story_is_told(self, story: Story) -> None:
        assert sorted(story.rounds) == sorted([*CUTS, "wrong block"]) == sorted(story.expected)


class TestFakeInAFreshProcess(FreshProcess):
    @pytest.fixture(scope="class")
    @classmethod
    def story(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
        folder = tmp_path_factory.mktemp("fresh")
        with load_engine("fake", step_s=0.002) as engine:
            story = live(engine, ids(700), folder / "packs")
            story.tell("fake", {}, folder)
            yield story


@pytest.mark.slow("runs a small model in two processes")
class TestSmallModelInAFreshProcess(FreshProcess):
    @pytest.fixture(scope="class")
    @classmethod
    def story(cls, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
        torch = pytest.importorskip("torch")
        folder = tmp_path_factory.mktemp("fresh")
        options: dict[str, str | int] = {
            "model": str(tiny_model("qwen2", dtype="float32")),
            "threads": torch.get_num_threads(),
        }
        with load_engine("transformers", **options) as engine:
            story = live(engine, ids(1000), folder / "packs")
            story.tell("transformers", options, folder)
            yield story


class TestRealModelInAFreshProcess(FreshProcess):
    """SmolLM2-135M-Instruct over a document of at least 3,000 tokens."""

    min_tokens = 3000

    @pytest.fixture(scope="class")
    @classmethod
    def story(cls, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
        torch = pytest.importorskip("torch")
        folder = tmp_path_factory.mktemp("fresh")
        options: dict[str, str | int] = {"model": str(demo_model), "threads": torch.get_num_threads()}
        with load_engine("transformers", **options) as engine:
            tokens = tuple(engine.codec.encode(document(), first=True))
            assert len(tokens) >= 3000
            story = live(engine, tokens, folder / "packs")
            story.tell("transformers", options, folder)
            yield story
