"""Law 2 and 3, boundary and whole state: resumed equals uninterrupted, bit for bit, wherever the cut was.

Asked of engines that declare `decode-exact`. "Uninterrupted" is always the same session (or its replay twin) that was
never captured from; "resumed" went through bytes on disk into another engine. Both run at equal batch shape.

An engine without "boundary-hidden" runs the last token of a prompt again; then everyone does who continues from there,
the parent too, and all of them are equal.
"""

from __future__ import annotations

import string
import threading

import pytest

from thaw.core.sampling import Sampling, derive
from thaw.engines.base import Captured, Completion, Engine, SessionRef
from thaw.testing.laws.kit import (
    LIMIT_S,
    LONGER_AND_LONGER,
    SEED,
    EngineKit,
    Lab,
    can,
    every_knob,
    greedy,
    ids,
    run_again,
    same,
    seeded,
    when,
)
from thaw.testing.plans import capture_plan

STYLES = {"greedy": greedy(20), "seeded": seeded(20), "penalties and min_tokens": every_knob()}


class BoundaryLaw(EngineKit):
    @pytest.fixture(params=list(STYLES))
    def sampling(self, request: pytest.FixtureRequest) -> Sampling:
        return STYLES[str(request.param)]

    def test_cut_before_the_first_generated_token(
        self, engine: Engine, other: Engine, lab: Lab, sampling: Sampling
    ) -> None:
        session = lab.begin(engine, 300)
        captured, child = lab.capture(engine, session), lab.twin(engine, session)
        whole = lab.one(engine, session, sampling)
        restored = lab.hydrate(other, lab.plan(captured)).session
        for resumed in (lab.one(other, restored, sampling), lab.one(engine, child, sampling)):
            same(whole, resumed)
            assert resumed.usage == whole.usage
        again = run_again(engine)
        assert (whole.usage.num_prefilled_tokens, whole.num_cached_tokens) == (again, 300 - again)

    @pytest.mark.parametrize("cut", [1, 9])
    def test_cut_after_some_generated_tokens(
        self, engine: Engine, other: Engine, lab: Lab, sampling: Sampling, cut: int
    ) -> None:
        session = lab.begin(engine, 300)
        whole = lab.one(engine, session, sampling)
        assert len(whole.token_ids) > cut
        part = lab.twin(engine, session, at=300 + cut)
        restored = lab.move(engine, part, other)
        assert other.view(restored).tokens == (*ids(300), *whole.token_ids[:cut])
        resumed = lab.resume(other, restored)[0]
        same(whole, resumed)
        assert resumed.usage.num_prefilled_tokens == 1

    def test_it_does_not_matter_how_the_session_came_by_its_blocks(
        self, engine: Engine, other: Engine, lab: Lab
    ) -> None:
        """Read piece by piece, in memory that grew; brought back in one go. The numbers must not know."""
        session = engine.open(seed=SEED)
        for start in range(0, 1500, 100):
            engine.append(session, ids(1500)[start : start + 100]).result(LIMIT_S)
        restored = lab.move(engine, session, other)
        same(lab.one(engine, session, seeded(16)), lab.one(other, restored, seeded(16)))

    def test_cut_across_a_block_border(self, engine: Engine, other: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 250)
        whole = lab.one(engine, session, seeded(16))
        for at in (255, 256, 257, 258):
            same(whole, lab.resume(other, lab.move(engine, lab.twin(engine, session, at=at), other))[0])

    def test_min_tokens_and_penalties_count_from_the_turns_start(self, engine: Engine, other: Engine, lab: Lab) -> None:
        """Counters that began anew at the cut would ban the stop ids for longer: the style must be able to show it."""
        session = lab.begin(engine, 60)
        stops = tuple(range(250))
        sampling = seeded(30, min_tokens=10, stop_token_ids=stops)
        whole = lab.one(engine, session, sampling)
        assert len(whole.token_ids) <= 14 and whole.finish_reason == "stop"
        for cut in (4, 9):
            same(whole, lab.resume(other, lab.move(engine, lab.twin(engine, session, at=60 + cut), other))[0])

    def test_a_bias_and_bad_words_go_on_across_the_cut(self, engine: Engine, other: Engine, lab: Lab) -> None:
        """A bad word of two tokens, cut between them: who forgets the first lets the second come."""
        session = lab.begin(engine, 60)
        letters = {engine.codec.encode(letter, first=False)[0]: 100.0 for letter in string.ascii_lowercase}
        free = lab.one(engine, lab.twin(engine, session), greedy(24, logit_bias=letters))
        assert set(free.token_ids) <= set(letters), "it is to write letters alone"
        word, begun = bad_word(engine, free)
        sampling = greedy(24, logit_bias=letters, bad_words=(word,))
        plain = lab.twin(engine, session)
        whole = lab.one(engine, session, sampling)
        assert whole.token_ids[:begun] == free.token_ids[:begun] and whole.token_ids[begun] != free.token_ids[begun]
        assert word not in whole.text
        for cut in (begun, begun + 3):
            same(whole, lab.resume(other, lab.move(engine, lab.twin(engine, session, at=60 + cut), other))[0])
        child = lab.move(engine, lab.twin(engine, session, at=60 + begun), other)
        assert lab.one(other, child, sampling).token_ids[0] == free.token_ids[begun], "a new turn has begun no word"
        hot = seeded(24, logit_bias=letters, bad_words=(word,))
        moved = lab.move(engine, plain, other)
        here = lab.run(engine, *lab.fork(engine, plain, 4), sampling=hot)
        there = lab.run(other, *lab.fork(other, moved, 4), sampling=hot)
        for one, two in zip(here, there, strict=True):
            same(one, two)
            assert word not in one.text

    def test_cut_at_a_stop_string(self, engine: Engine, other: Engine, lab: Lab) -> None:
        """In the middle of one, and after one: the next turn goes on alike."""
        session = lab.begin(engine, 60)
        probe = lab.one(engine, lab.twin(engine, session), seeded(64))
        sampling = seeded(64, stop=(stop_string(probe),))
        whole = lab.one(engine, session, sampling)
        assert whole.finish_reason == "stop" and whole.stop_reason == sampling.stop[0]
        length = len(whole.token_ids)
        for at in (length - 1, length - 2):
            same(whole, lab.resume(other, lab.move(engine, lab.twin(engine, session, at=60 + at), other))[0])
        stopped = lab.move(engine, session, other)
        assert other.view(stopped).turns[-1].text == whole.text
        same(lab.one(engine, session, seeded(8), (4, 5)), lab.one(other, stopped, seeded(8), (4, 5)))

    @pytest.mark.parametrize("style", ["greedy", "seeded"])
    def test_captured_from_another_thread_in_the_middle_of_generating(
        self, engine: Engine, other: Engine, lab: Lab, style: str
    ) -> None:
        session = lab.begin(engine, 300)
        for count in LONGER_AND_LONGER:
            sampling = greedy(count) if style == "greedy" else seeded(count)
            expected = lab.one(engine, lab.twin(engine, session), sampling)
            whole, captured = _generate_and_capture(engine, lab, lab.twin(engine, session), sampling)
            same(expected, whole)
            cut = len(captured.tokens) - 300
            if cut < count:
                break
        assert 5 <= cut < count and captured.turns[-1].finish_reason is None
        assert captured.tokens == (*ids(300), *whole.token_ids[:cut])
        same(whole, lab.resume(other, lab.hydrate(other, lab.plan(captured)).session)[0])

    def test_a_second_turn_after_a_hydrate_is_exact_too(self, engine: Engine, other: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 120)
        lab.one(engine, session, seeded(7), ids(30, 3))
        restored = lab.move(engine, session, other)
        for prompt in (ids(17, 4), (), ids(1, 5)):
            same(lab.one(engine, session, seeded(6), prompt), lab.one(other, restored, seeded(6), prompt))

    def test_four_children_live_equal_four_children_hydrated_elsewhere(
        self, engine: Engine, other: Engine, lab: Lab
    ) -> None:
        session = lab.begin(engine, 300)
        plan = lab.plan(lab.capture(engine, session))
        live = lab.run(engine, *lab.fork(engine, session, 4), sampling=seeded(16), prompt=(7, 7))
        shared = lab.run(
            other, *lab.fork(other, lab.hydrate(other, plan).session, 4), sampling=seeded(16), prompt=(7, 7)
        )
        for one, two in zip(live, shared, strict=True):
            same(one, two)

    @pytest.mark.parametrize("n", [2, 9])
    def test_children_that_share_blocks_equal_children_that_own_copies(
        self, engine: Engine, other: Engine, lab: Lab, n: int
    ) -> None:
        """The same batch, once over one stored prefix and once over n: who owns a block is nobody's business."""
        session = lab.begin(engine, 600)
        plan = lab.plan(lab.capture(engine, session))
        shared = lab.run(engine, *lab.fork(engine, session, n), sampling=seeded(6), prompt=(7, 7, 7))
        own = [lab.hydrate(other, plan).session for _ in range(n)]
        own = [lab.fork(other, one, seeds=[derive(SEED, 600, i)])[0] for i, one in enumerate(own)]
        owned = lab.run(other, *own, sampling=seeded(6), prompt=(7, 7, 7))
        for one, two in zip(shared, owned, strict=True):
            same(one, two)

    def test_children_differ_by_seed_and_the_seed_is_derived(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 50)
        children = lab.fork(engine, session, 4)
        outs = lab.run(engine, *children, sampling=seeded(16))
        assert len({out.token_ids for out in outs}) == 4
        assert [out.seed for out in outs] == [derive(20, 50, i) for i in range(4)]
        assert [engine.view(child).seed for child in children] == [out.seed for out in outs]

    def test_replay_repeats_the_parent(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 80)
        before = lab.twin(engine, session)
        whole = lab.one(engine, session, seeded(16))
        same(whole, lab.one(engine, before, seeded(16)))
        same(whole, lab.resume(engine, lab.twin(engine, session, at=85))[0])
        other_seed = lab.fork(engine, session, at=85)[0]
        assert lab.resume(engine, other_seed)[0].token_ids != whole.token_ids

    def test_a_child_of_a_cut_turn_keeps_the_first_tokens_and_takes_its_own_seed(
        self, engine: Engine, lab: Lab
    ) -> None:
        session = lab.begin(engine, 80)
        whole = lab.one(engine, session, seeded(16))
        outs = lab.resume(engine, *lab.fork(engine, session, 3, at=86))
        assert {out.token_ids[:6] for out in outs} == {whole.token_ids[:6]}
        assert len({out.token_ids for out in outs}) == 3
        assert [out.seed for out in outs] == [derive(20, 86, i) for i in range(3)]

    def test_a_child_that_went_its_own_way_is_cut_like_any_other(self, engine: Engine, other: Engine, lab: Lab) -> None:
        """Begun at an earlier token of its parent, which has KV of other tokens there."""
        child = lab.twin(engine, lab.begin(engine, 300), at=280)
        whole = lab.one(engine, child, seeded(12), ids(3, 9))
        for at in (285, 290):
            same(whole, lab.resume(other, lab.move(engine, lab.twin(engine, child, at=at), other))[0])

    def test_a_point_inside_a_prompt_equals_any_other_fork_there(self, engine: Engine, other: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 400)
        captured = lab.capture(engine, session)
        lab.one(engine, session, greedy(3))
        for at in (1, 100, 256, 257, 399):
            live = lab.one(engine, lab.twin(engine, session, at=at), seeded(6))
            again = lab.one(engine, lab.twin(engine, session, at=at), seeded(6))
            hydrated = lab.one(other, lab.hydrate(other, lab.plan(captured, at=at)).session, seeded(6))
            same(live, again)
            same(live, hydrated)

    def test_regenerating_from_a_prompts_end_with_the_same_seed(self, engine: Engine, other: Engine, lab: Lab) -> None:
        """What the session said, bit for bit, if its prompt was read before it was answered: from a capture that was
        made there, from a later one, and live. The control: another seed."""
        session = lab.begin(engine, 400)
        there = lab.capture(engine, session)
        whole = lab.one(engine, session, seeded(12))
        later = lab.capture(engine, session)
        same(whole, lab.one(other, lab.hydrate(other, lab.plan(there)).session, seeded(12)))
        same(whole, lab.one(other, lab.hydrate(other, lab.plan(later, at=400)).session, seeded(12)))
        same(whole, lab.one(engine, lab.twin(engine, session, at=400), seeded(12)))
        assert lab.one(engine, lab.twin(engine, session, at=400), seeded(12, seed=5)).token_ids != whole.token_ids

    def test_a_point_inside_generated_text_is_exact_from_disk_too(
        self, engine: Engine, other: Engine, lab: Lab
    ) -> None:
        session = lab.begin(engine, 250)
        whole = lab.one(engine, session, seeded(20))
        captured = lab.capture(engine, session)
        for at in (251, 256, 260, 269):
            same(whole, lab.resume(other, lab.hydrate(other, lab.plan(captured, at=at)).session)[0])

    def test_the_boundary_digest_is_of_the_logits_that_come_next(self, engine: Engine, other: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 100)
        captured = lab.capture(engine, session)
        if not can(engine, "boundary"):
            assert captured.boundary is None
            return
        assert captured.boundary is not None and captured.boundary.position == 100
        first = lab.one(engine, session, greedy(1, logprobs=3))
        assert first.top_logprobs is not None
        tops = dict(captured.boundary.top)
        assert first.token_ids[0] == captured.boundary.top[0][0]
        assert all(tops[token] == logprob for token, logprob in first.top_logprobs[0])

    def test_two_generates_at_once_do_not_change_each_others_bits(
        self, engine: Engine, other: Engine, lab: Lab
    ) -> None:
        """Without "own-batch" they may; then each still has its own tokens, and a state that goes on elsewhere."""
        one, two = lab.begin(engine, 300), lab.begin(engine, 90, start=2, seed=5)
        alone = [lab.one(engine, lab.twin(engine, s), seeded(24)) for s in (one, two)]
        handles = [lab.start(engine, s, sampling=seeded(24)) for s in (one, two)]
        third = engine.append(engine.open(), ids(700, 8))
        together = [handle.result(LIMIT_S)[0] for handle in handles]
        assert third.result(LIMIT_S).tokens == ids(700, 8)
        if can(engine, "own-batch"):
            for a, b in zip(alone, together, strict=True):
                same(a, b)
        for session, prompt, out in zip((one, two), (ids(300), ids(90, 2)), together, strict=True):
            assert (len(out.token_ids), len(out.logprobs), out.finish_reason) == (24, 24, "length")
            assert engine.view(session).tokens == (*prompt, *out.token_ids)
            restored = lab.move(engine, session, other)
            same(lab.one(engine, session, seeded(8)), lab.one(other, restored, seeded(8)))


def _generate_and_capture(
    engine: Engine, lab: Lab, session: SessionRef, sampling: Sampling
) -> tuple[Completion, Captured]:
    """Generate; once five tokens are out, capture from another thread."""
    handle, found = lab.start(engine, session, sampling=sampling), []

    def capture() -> None:
        found.append(engine.capture(session, capture_plan(lab.mount, num_packs=engine.info.num_packs)).result(LIMIT_S))

    thread = threading.Thread(target=capture)
    when(handle, 5, thread.start)
    thread.join(LIMIT_S)
    return handle.result(LIMIT_S)[0], found[0]


def bad_word(engine: Engine, out: Completion) -> tuple[str, int]:
    """A word of two tokens that the output has, for the first time, and where its second token stands."""
    for i in range(1, len(out.token_ids)):
        pair = list(out.token_ids[i - 1 : i + 1])
        word = engine.codec.decode(pair)
        if engine.codec.encode(word, first=False) == pair and out.text.find(word) == i - 1:
            return word, i
    raise AssertionError(f"no usable word in {out.text!r}; generate more")


def stop_string(out: Completion) -> str:
    """Two characters of the text that occur once, late enough, and are whole: a stop string across a token border."""
    text = out.text
    for at in range(2, len(text) - 1):
        pair = text[at : at + 2]
        if pair.isascii() and pair.isprintable() and text.find(pair) == at:
            return pair
    raise AssertionError(f"no usable stop string in {text!r}; generate more")
