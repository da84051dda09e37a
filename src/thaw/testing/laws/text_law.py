"""Generating: batches, streams, stops, log probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from thaw.core.errors import ThawError
from thaw.core.sampling import Sampling
from thaw.engines.base import Completion, Engine, GenerateRequest, SessionRef
from thaw.engines.text import text_after
from thaw.testing.laws.boundary_law import stop_string
from thaw.testing.laws.kit import LIMIT_S, EngineKit, Lab, bits, can, greedy, ids, same, seeded


class TextLaw(EngineKit):
    def test_the_group_runs_as_one_batch(self, engine: Engine, lab: Lab) -> None:
        """Every step brings one token of every session: nobody waits for a sibling's end. So equal groups are equal
        batches, with equal bits. Without "own-batch" news may reach the caller in any order; of four that started in
        one step, none is through while another is not half way, where this thread hears of it as it happens."""
        session = lab.begin(engine, 60)
        for _ in range(5):
            handle = lab.start(engine, *lab.fork(engine, session, 4), sampling=seeded(48))
            order = [delta.index for delta in handle for _ in delta.token_ids]
            outs = handle.result(LIMIT_S)
            assert [len(out.token_ids) for out in outs] == [48] * 4
            if can(engine, "own-batch"):
                assert order == [0, 1, 2, 3] * 48 == [delta.index for delta in handle]
            first_end = min(max(at for at, index in enumerate(order) if index == lane) for lane in range(4))
            if all(order[:first_end].count(lane) >= 24 for lane in range(4)):
                break
        else:
            raise AssertionError("each time one was through before another was half way")
        for one, two in zip(outs, lab.run(engine, *lab.fork(engine, session, 4), sampling=seeded(48)), strict=True):
            same(one, two)

    def test_results_come_in_the_order_of_the_requests(self, engine: Engine, lab: Lab) -> None:
        sessions = [lab.begin(engine, 10 + i, start=i) for i in range(3)]
        outs = lab.run(engine, *reversed(sessions), sampling=greedy(3))
        assert [out.session for out in outs] == list(reversed(sessions))
        assert [out.usage.num_prompt_tokens for out in outs] == [12, 11, 10]

    def test_each_request_has_its_own_prompt_and_sampling(self, engine: Engine, lab: Lab) -> None:
        kids = lab.fork(engine, lab.begin(engine, 40), 3)
        samplings = (greedy(3), seeded(9), seeded(6, seed=77))
        requests = [
            GenerateRequest(session=kid, prompt=ids(i + 1, i), sampling=s)
            for i, (kid, s) in enumerate(zip(kids, samplings, strict=True))
        ]
        outs = engine.generate(requests).result(LIMIT_S)
        assert [len(out.token_ids) for out in outs] == [3, 9, 6]
        assert [out.usage.num_prompt_tokens for out in outs] == [41, 42, 43]
        assert outs[2].seed == 77

    def test_streamed_pieces_add_up(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 60)
        handle = lab.start(engine, *lab.fork(engine, session, 3), sampling=seeded(40))
        deltas = list(handle)
        for index, out in enumerate(handle.result(LIMIT_S)):
            mine = [delta for delta in deltas if delta.index == index]
            assert "".join(delta.text for delta in mine) == out.text
            assert tuple(t for delta in mine for t in delta.token_ids) == out.token_ids
            assert bits([x for delta in mine for x in delta.logprobs]) == bits(out.logprobs)
            assert [delta.finish_reason for delta in mine] == [None] * (len(mine) - 1) + [out.finish_reason]
            assert {delta.session for delta in mine} == {out.session}
        assert list(handle) == deltas, "iterating again gives the same again"

    def test_a_resumed_stream_brings_only_what_is_new(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 60)
        whole = lab.one(engine, session, seeded(40))
        child = lab.twin(engine, session, at=80)
        handle = engine.generate([GenerateRequest(session=child, resume=True)])
        deltas = list(handle)
        out = handle.result(LIMIT_S)[0]
        same(whole, out)
        assert tuple(t for delta in deltas for t in delta.token_ids) == out.token_ids[20:]
        news = "".join(delta.text for delta in deltas)
        assert out.text.endswith(news) and len(news) < len(out.text)

    def test_text_is_what_the_tokens_say_at_any_cut(self, engine: Engine, lab: Lab) -> None:
        """Turns and forks that begin inside a character lose nothing of it, streamed or not."""
        session = lab.begin(engine, 60)
        for length in (1, 2, 3, 1, 7, 20):
            handle = lab.start(engine, session, sampling=seeded(length))
            streamed = "".join(delta.text for delta in handle)
            assert handle.result(LIMIT_S)[0].text == streamed
        tokens = engine.view(session).tokens
        assert len(tokens) == 94
        for at in range(61, 95):
            child = session if at == 94 else lab.twin(engine, session, at=at)
            assert _answers(engine, child) == text_after(engine.codec, tokens[:60], tokens[60:at])
        halfway = lab.twin(engine, session, at=80)
        lab.one(engine, halfway, seeded(9))
        assert _answers(engine, halfway) == text_after(engine.codec, tokens[:60], engine.view(halfway).tokens[60:])

    @pytest.mark.parametrize("cut", [1, 2, 3])
    def test_a_character_that_the_prompt_begins_is_said_whole(self, engine: Engine, lab: Lab, cut: int) -> None:
        """Also one that a stop string begins with."""
        session = lab.begin(engine, 60)
        tokens = engine.codec.encode("👏☃", first=False)
        engine.append(session, tokens[:cut]).result(LIMIT_S)
        for token in tokens[cut:-1]:
            lab.one(engine, session, _this(token))
        stopped = lab.twin(engine, session)
        begun = text_after(engine.codec, [], tokens[:cut])
        assert lab.one(engine, session, _this(tokens[-1])).text.endswith("☃")
        assert begun + _answers(engine, session) == "👏☃"
        end = lab.one(engine, stopped, _this(tokens[-1], stop=("☃",)))
        assert (end.text, end.finish_reason, end.stop_reason) == ("", "stop", "☃")

    def test_a_stop_string_across_token_borders_ends_the_turn(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 60)
        probe = lab.one(engine, lab.twin(engine, session), seeded(64))
        stop = stop_string(probe)
        handle = lab.start(engine, session, sampling=seeded(64, stop=("never to be seen", stop)))
        streamed = "".join(delta.text for delta in handle)
        out = handle.result(LIMIT_S)[0]
        assert (out.finish_reason, out.stop_reason) == ("stop", stop)
        assert out.text == streamed == probe.text[: probe.text.index(stop)]
        assert out.token_ids == probe.token_ids[: len(out.token_ids)], "the ids keep what the text lost"
        assert len(out.token_ids) < 64
        assert stop in engine.codec.decode(out.token_ids)
        assert engine.view(session).tokens[60:] == out.token_ids

    def test_a_stop_id_ends_the_turn_and_min_tokens_holds_it_back(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 60)
        probe = lab.one(engine, lab.twin(engine, session), seeded(20))
        victim = probe.token_ids[3]
        first = probe.token_ids.index(victim)
        out = lab.one(engine, lab.twin(engine, session), seeded(20, stop_token_ids=(victim,)))
        assert (out.finish_reason, out.stop_reason) == ("stop", victim)
        assert out.token_ids == probe.token_ids[: first + 1]
        held = lab.one(engine, lab.twin(engine, session), seeded(20, stop_token_ids=(victim,), min_tokens=15))
        assert victim not in held.token_ids[:15]

    def test_the_end_token_ends_the_turn_unless_ignored(self, engine: Engine, lab: Lab) -> None:
        if not engine.info.eos_token_ids:
            pytest.skip("this model has no end token")
        session = lab.begin(engine, 60)
        batch = _batch_with_an_end(engine, lab, session, self.max_batch)
        for out in batch:
            ends = [token in engine.info.eos_token_ids for token in out.token_ids]
            assert True not in ends[:-1] and (out.finish_reason == "stop") == ends[-1]
            assert out.stop_reason is None and (ends[-1] or len(ends) == 100)
        # The first to end: until then this batch and the next have one shape.
        ended = min(batch, key=lambda out: (len(out.token_ids), out.finish_reason != "stop"))
        again = _batch(engine, lab, session, [out.seed for out in batch], len(ended.token_ids) + 2, ignore_eos=True)
        ignored = again[batch.index(ended)]
        assert ignored.token_ids[:-2] == ended.token_ids and ignored.finish_reason == "length"

    def test_every_end_token_ends_the_turn_unless_ignored(self, engine: Engine, lab: Lab) -> None:
        """The tokenizer's and those that the model's files name, whichever of them the server knows itself."""
        session = lab.begin(engine, 60)
        for token in engine.info.eos_token_ids:
            wanted = {"logit_bias": {token: 100.0}}
            out = lab.one(engine, lab.twin(engine, session), greedy(4, ignore_eos=False, **wanted))
            assert (out.token_ids, out.finish_reason, out.stop_reason) == ((token,), "stop", None)
            assert out.text == "", "an end of a turn is no text"
            free = lab.one(engine, lab.twin(engine, session), greedy(4, **wanted))
            assert (free.token_ids, free.finish_reason) == ((token,) * 4, "length")
            held = lab.one(engine, lab.twin(engine, session), greedy(4, ignore_eos=False, min_tokens=2, **wanted))
            assert token not in held.token_ids[:2] and held.token_ids[2:] == (token,) and held.finish_reason == "stop"

    def test_logprobs_are_of_the_raw_distribution(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 60)
        plain = lab.one(engine, lab.twin(engine, session), greedy(1, logprobs=5))
        warped = lab.one(
            engine, lab.twin(engine, session), seeded(1, logprobs=5, temperature=0.01, repetition_penalty=2.0, top_k=1)
        )
        assert plain.top_logprobs == warped.top_logprobs and plain.top_logprobs is not None
        top = plain.top_logprobs[0]
        assert len(top) == 5 and [x for _, x in top] == sorted((x for _, x in top), reverse=True)
        assert top[0] == (plain.token_ids[0], plain.logprobs[0])
        assert 0 < math.fsum(math.exp(x) for _, x in top) <= 1 + 1e-6

    def test_entropies_are_of_the_raw_distribution_over_the_full_vocabulary(self, engine: Engine, lab: Lab) -> None:
        """However the tokens are chosen from it; between the least and the most that its largest twenty leave open."""
        session = lab.begin(engine, 60)
        if not can(engine, "entropy"):
            with pytest.raises(ThawError, match="entropy"):
                lab.one(engine, session, greedy(1, entropy=True))
            return
        plain = lab.one(engine, lab.twin(engine, session), greedy(1, entropy=True, logprobs=20))
        knobs = {"temperature": 0.01, "repetition_penalty": 2.0, "top_k": 1, "logit_bias": {3: 9.0}}
        warped = lab.one(engine, lab.twin(engine, session), seeded(1, entropy=True, logprobs=20, **knobs))
        assert plain.entropies is not None and bits(plain.entropies) == bits(warped.entropies or ())
        out = lab.one(engine, session, seeded(12, entropy=True, logprobs=20))
        assert out.entropies is not None and out.top_logprobs is not None and len(out.entropies) == 12
        for entropy, top in zip(out.entropies, out.top_logprobs, strict=True):
            probs = [math.exp(x) for _, x in top]
            head, rest = math.fsum(-p * math.log(p) for p in probs), max(1.0 - math.fsum(probs), 1e-12)
            left = engine.info.vocab_size - len(probs)
            assert head - rest * math.log(rest) - 1e-3 <= entropy <= head - rest * math.log(rest / left) + 1e-3
        assert len({round(entropy, 6) for entropy in out.entropies}) > 6, "a constant would pass the bounds"
        assert lab.one(engine, session, greedy(2)).entropies is None

    def test_entropies_are_part_of_the_session(self, engine: Engine, other: Engine, lab: Lab) -> None:
        """A turn that goes on elsewhere, or from its middle, has those that it had."""
        session = lab.begin(engine, 60)
        whole = lab.one(engine, lab.twin(engine, session), seeded(16))
        if not can(engine, "entropy"):
            return
        told = lab.one(engine, session, seeded(16, entropy=True))
        assert (told.token_ids, bits(told.logprobs)) == (whole.token_ids, bits(whole.logprobs))
        assert engine.view(session).turns[-1].entropies == told.entropies is not None
        captured = lab.capture(engine, session)
        for where, cut in (
            (engine, lab.twin(engine, session, at=66)),
            (other, lab.hydrate(other, lab.plan(captured, at=66)).session),
        ):
            assert where.view(cut).turns[-1].entropies == told.entropies[:6]
            same(told, lab.resume(where, cut)[0])

    def test_one_session_at_temperature_zero_ignores_the_seed(self, engine: Engine, lab: Lab) -> None:
        session = lab.begin(engine, 60)
        same(*(lab.one(engine, kid, greedy(8)) for kid in lab.fork(engine, session, 2)))

    def test_the_turns_seed_may_be_given(self, engine: Engine, lab: Lab) -> None:
        kids = lab.fork(engine, lab.begin(engine, 60), 3)
        one, two = (lab.one(engine, kid, seeded(12, seed=5)) for kid in kids[:2])
        same(one, two)
        assert lab.one(engine, kids[2], seeded(12, seed=6)).token_ids != one.token_ids


def _this(token: int, **options: object) -> Sampling:
    """One token: this one."""
    return greedy(1, logit_bias={token: 100.0}, **options)


def _answers(engine: Engine, session: SessionRef) -> str:
    """The texts of a session's completions."""
    return "".join(turn.text for turn in engine.view(session).turns if turn.kind == "completion")


def _batch(
    engine: Engine, lab: Lab, session: SessionRef, seeds: Sequence[int], max_tokens: int, *, ignore_eos: bool
) -> list[Completion]:
    """One batch over children of `session`, one a seed. A high temperature makes the end token likely enough."""
    requests = [
        GenerateRequest(session=kid, sampling=seeded(max_tokens, ignore_eos=ignore_eos, seed=seed, temperature=2.0))
        for kid, seed in zip(lab.fork(engine, session, len(seeds)), seeds, strict=True)
    ]
    return engine.generate(requests).result(LIMIT_S)


def _batch_with_an_end(engine: Engine, lab: Lab, session: SessionRef, size: int) -> list[Completion]:
    """A batch in which the model says its end token."""
    for seed in range(0, 512, size):
        outs = _batch(engine, lab, session, range(seed, seed + size), 100, ignore_eos=False)
        if any(out.finish_reason == "stop" for out in outs):
            return outs
    raise AssertionError("no seed of 512 made the model end its turn")
