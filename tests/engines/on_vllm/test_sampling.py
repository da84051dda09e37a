"""thaw's sampling inside vLLM: the processor on batches made by hand, and once the real engine on a small model.

`vllm.v1` and not `vllm` is asked for: this folder's own name is one that Python would import.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thaw.core.errors import BadSampling
from thaw.core.sampling import Sampling
from thaw.engines.hf.codec import HFCodec
from thaw.engines.sampling import sampler as reference
from thaw.engines.sampling.spec import SampleSpec
from thaw.engines.served import protocol
from thaw.engines.served.sampling_extra import EXTRA, SamplingExtra, from_extra, needed, to_extra
from thaw.engines.session.bad_words import bad_ids, endings

VOCAB = 320
EOS = 258


# --- what travels: no vLLM needed


def test_an_extra_comes_back_as_it_went_through_json() -> None:
    sampling = Sampling(temperature=0.7, top_p=1.0, stop=("a",), stop_token_ids=(4, 5), seed=(1 << 64) - 1)  # type: ignore[arg-type]
    plain = to_extra(sampling, seed=(1 << 64) - 2, output_start=17, eos_token_ids=[9, 3])
    back = from_extra({EXTRA: json.loads(json.dumps(plain)), "other": object()})
    assert back == SamplingExtra(sampling=sampling, seed=(1 << 64) - 2, output_start=17, eos_token_ids=(3, 9))  # type: ignore[arg-type]
    assert plain["seed"] == str((1 << 64) - 2) and plain["sampling"]["seed"] == str((1 << 64) - 1)


def test_without_the_key_there_is_nothing() -> None:
    assert from_extra(None) is None and from_extra({}) is None and from_extra({"kv_transfer_params": {}}) is None


GARBAGE: dict[str, Any] = {
    "nothing": None,
    "text": "hot",
    "an empty object": {},
    "a seed as a number": {"sampling": {}, "seed": 3, "output_start": 0},
    "a seed of 65 bits": {"sampling": {}, "seed": str(1 << 64), "output_start": 0},
    "a negative start": {"sampling": {}, "seed": "3", "output_start": -1},
    "an unknown field": {"sampling": {}, "seed": "3", "output_start": 0, "colour": 1},
    "an unknown parameter": {"sampling": {"colour": 1}, "seed": "3", "output_start": 0},
    "a temperature below 0": {"sampling": {"temperature": -1.0}, "seed": "3", "output_start": 0},
    "a temperature that is none": {"sampling": {"temperature": math.nan}, "seed": "3", "output_start": 0},
    "a negative end of text": {"sampling": {}, "seed": "3", "output_start": 0, "eos_token_ids": [-1]},
    "bad words without their ids": {"sampling": {"bad_words": ["a"]}, "seed": "3", "output_start": 0},
    "ids of no bad words": {"sampling": {}, "seed": "3", "output_start": 0, "bad_ids": [[1]]},
    "a bad word of no ids": {"sampling": {"bad_words": ["a"]}, "seed": "3", "output_start": 0, "bad_ids": [[]]},
    "a bias of 101": {"sampling": {"logit_bias": [[1, 101]]}, "seed": "3", "output_start": 0},
    "no JSON": {"sampling": {}, "seed": "3", "output_start": {1, 2}},
    "a huge number": {"sampling": {}, "seed": "3", "output_start": 1 << 63},
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_is_refused_by_name(what: str) -> None:
    with pytest.raises(BadSampling, match=EXTRA):
        from_extra({EXTRA: GARBAGE[what]})


def test_bad_words_travel_as_token_ids() -> None:
    sampling = Sampling(bad_words=("ab", "c"))
    plain = to_extra(sampling, seed=1, output_start=2, bad_ids=((97, 98), (99,)))
    assert from_extra({EXTRA: json.loads(json.dumps(plain))}).bad_ids == ((97, 98), (99,))  # type: ignore[union-attr]
    with pytest.raises(BadSampling, match="bad_ids"):
        to_extra(sampling, seed=1, output_start=2)


def test_only_what_vllm_cannot_do_itself_needs_thaw() -> None:
    assert not needed(Sampling(temperature=0.0)) and not needed(Sampling(temperature=0.0, top_p=0.5, top_k=3))
    for knobs in (
        {"temperature": 0.5}, {"min_tokens": 1}, {"repetition_penalty": 0.9}, {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1}, {"logit_bias": {3: 1.0}}, {"bad_words": ("a",)},
    ):  # fmt: skip
        assert needed(Sampling(**{"temperature": 0.0, **knobs}))  # type: ignore[arg-type]


# --- the processor, batches made by hand


@pytest.fixture(scope="module")
def v1() -> Any:
    """vLLM's V1 interface, thaw's processor and torch, as one namespace."""
    pytest.importorskip("vllm.v1.sample.logits_processor")
    import torch
    from vllm import SamplingParams
    from vllm.v1.sample import logits_processor as lp

    from thaw.engines.vllm.sampling import QUALNAME, ThawSampling

    return SimpleNamespace(
        torch=torch, SamplingParams=SamplingParams, ThawSampling=ThawSampling, QUALNAME=QUALNAME,
        BatchUpdate=lp.BatchUpdate, Move=lp.MoveDirectionality, load=lp._load_logitsprocs_by_fqcns,
    )  # fmt: skip


def config(**changes: Any) -> Any:
    model = {"enable_prompt_embeds": False, "logprobs_mode": "raw_logprobs", "logits_processors": ["some"]}
    speculative = changes.pop("speculative_config", None)
    return SimpleNamespace(model_config=SimpleNamespace(**(model | changes)), speculative_config=speculative)


def processor(v1: Any) -> Any:
    return v1.ThawSampling(config(), v1.torch.device("cpu"), False)


BAD_IDS = ((3,), (1, 2), (4, 5, 6), (7, 7), (9, 11))
"""What `bad_words` stand for in batches made by hand."""


def params(v1: Any, sampling: Sampling | None, seed: int = 1, start: int = 0, ends: tuple[int, ...] = (EOS,)) -> Any:
    if sampling is None:
        return v1.SamplingParams(temperature=0.0)
    bad = BAD_IDS if sampling.bad_words else ()
    extra = to_extra(sampling, seed=seed, output_start=start, eos_token_ids=ends, bad_ids=bad)
    return v1.SamplingParams(temperature=0.0, extra_args={EXTRA: extra})


def update(v1: Any, size: int, removed: Any = (), added: Any = (), moved: Any = ()) -> Any:
    return v1.BatchUpdate(batch_size=size, removed=removed, added=added, moved=moved)


def logits_of(v1: Any, seed: int, rows: int) -> Any:
    dice = random.Random(seed)
    return v1.torch.tensor([[round(dice.gauss(0, 3) * 4096) / 4096 for _ in range(VOCAB)] for _ in range(rows)])


def expected(logits: list[float], sampling: Sampling, seed: int, history: list[int], start: int) -> int:
    few = len(history) - start < sampling.min_tokens
    banned = frozenset(t for t in (EOS, *sampling.stop_token_ids) if t < VOCAB) if few else frozenset()
    if sampling.bad_words:
        banned |= endings(BAD_IDS, history[start:])
    return reference.choose(
        logits, SampleSpec(sampling=sampling, seed=seed, position=len(history), history=history, output_start=start,
                           banned=banned, num_top=0)
    ).token  # fmt: skip


def chosen(v1: Any, out: Any, index: int) -> int:
    """The one token left in a row of thaw's."""
    (left,) = v1.torch.isfinite(out[index]).nonzero().flatten().tolist()
    assert int(out[index].argmax()) == left
    return int(left)


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.95, 0.61, 0.1]),
    top_k=st.sampled_from([0, -1, 1, 17, 400]),
    min_p=st.sampled_from([0.0, 0.013, 0.2]),
    repetition_penalty=st.sampled_from([1.0, 1.31, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.43, -0.9]),
    frequency_penalty=st.sampled_from([0.0, 0.37, -0.21]),
    stop_token_ids=st.sampled_from([(), tuple(range(0, VOCAB, 2)), (VOCAB + 5,)]),
    min_tokens=st.sampled_from([0, 3, 12]),
    logit_bias=st.sampled_from([{}, dict.fromkeys(range(31), 8.0), {2: 100.0, 3: 100.0, 6: 100.0, 250: -3.5}]),
    bad_words=st.sampled_from([(), ("some",)]),
)


@settings(max_examples=150, deadline=None)
@given(
    samplings, st.integers(0, 2**64 - 1), st.lists(st.integers(0, 30), min_size=1, max_size=30),
    st.lists(st.integers(0, 30), max_size=12), st.integers(0, 30), st.integers(0, 10**6),
)  # fmt: skip
def test_the_token_is_the_reference_samplers(
    v1: Any, s: Sampling, seed: int, prompt: list[int], output: list[int], start: int, dice: int
) -> None:
    start = min(start, len(prompt))
    logits = logits_of(v1, dice, 3)
    before = logits.clone()
    ours = processor(v1)
    ours.update_state(update(v1, 3, added=[
        (0, params(v1, None), [1], []), (1, params(v1, s, seed, start), prompt, output), (2, params(v1, None), [1], []),
    ]))  # fmt: skip
    out = ours.apply(logits)
    assert chosen(v1, out, 1) == expected(before[1].tolist(), s, seed, prompt + output, start)
    assert v1.torch.equal(out[0], before[0]) and v1.torch.equal(out[2], before[2])


@settings(max_examples=60, deadline=None)
@given(samplings, st.lists(st.integers(0, 30), min_size=4, max_size=30), st.data())
def test_where_the_request_was_cut_does_not_matter(v1: Any, s: Sampling, tokens: list[int], data: Any) -> None:
    """The same tokens as prompt and output, or all of them as prompt: the same next token."""
    start, cut = (data.draw(st.integers(1, len(tokens) - 1)) for _ in range(2))
    logits = logits_of(v1, len(tokens), 1)
    ours, again = processor(v1), processor(v1)
    ours.update_state(update(v1, 1, added=[(0, params(v1, s, 9, start), tokens[:cut], tokens[cut:])]))
    again.update_state(update(v1, 1, added=[(0, params(v1, s, 9, start), tokens, [])]))
    assert chosen(v1, ours.apply(logits.clone()), 0) == chosen(v1, again.apply(logits.clone()), 0)


def test_the_output_list_is_read_as_it_grows(v1: Any) -> None:
    s, output = Sampling(temperature=2.0, frequency_penalty=1.5, min_tokens=3, stop_token_ids=(7,)), [4]
    ours = processor(v1)
    ours.update_state(update(v1, 1, added=[(0, params(v1, s, 5, 2), [1, 2], output)]))
    for step in range(8):
        logits = logits_of(v1, step, 1)
        token = expected(logits[0].tolist(), s, 5, [1, 2, *output], 2)
        assert chosen(v1, ours.apply(logits), 0) == token
        output.append(token)
        ours.update_state(None)


class Batch:
    """What the indices hold, told the same updates: the model of vLLM's persistent batch."""

    def __init__(self, v1: Any) -> None:
        self.v1, self.held, self.ours = v1, {}, processor(v1)  # type: ignore[var-annotated]

    def tell(self, size: int, removed: Any = (), added: Any = (), moved: Any = ()) -> None:
        """`added` as (index, seed), seed None for a request without thaw's extra."""
        for index in removed:
            del self.held[index]
        self.held.update(added)
        for a, b, swap in moved:
            if swap:
                self.held[a], self.held[b] = self.held[b], self.held[a]
            else:
                self.held[b] = self.held.pop(a)
        v1, hot = self.v1, Sampling(temperature=9.0)
        asked = [(i, params(v1, None if seed is None else hot, seed or 0), [1], []) for i, seed in added]
        moves = [(a, b, v1.Move.SWAP if swap else v1.Move.UNIDIRECTIONAL) for a, b, swap in moved]
        self.ours.update_state(update(v1, size, removed, asked, moves))

    def check(self) -> None:
        before = logits_of(self.v1, 3, 6)
        out = self.ours.apply(before.clone())
        for index in range(6):
            seed = self.held.get(index)
            if seed is None:
                assert self.v1.torch.equal(out[index], before[index])
            else:
                assert chosen(self.v1, out, index) == expected(
                    before[index].tolist(), Sampling(temperature=9.0), seed, [1], 0
                )


def test_rows_follow_their_requests(v1: Any) -> None:
    batch = Batch(v1)
    batch.tell(4, added=[(0, 10), (1, None), (2, 12), (3, 13)])
    batch.check()
    batch.tell(4, moved=[(0, 1, True)])  # thaw's with another's
    batch.check()
    batch.tell(4, moved=[(1, 2, True)])  # thaw's with thaw's
    batch.check()
    batch.tell(3, removed=[0], moved=[(3, 0, False)])  # another's goes, the last one fills the gap
    batch.check()
    batch.tell(2, removed=[2], moved=[])
    batch.check()
    batch.tell(2, added=[(0, None)])  # in the place of thaw's
    batch.check()
    batch.tell(2, added=[(0, 20), (1, 21)], moved=[(0, 1, False)])  # one way onto thaw's
    batch.check()
    batch.tell(0, removed=[1])
    batch.check()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_follow_any_history(v1: Any, data: Any) -> None:
    batch = Batch(v1)
    for _ in range(data.draw(st.integers(1, 6))):
        removed = sorted(data.draw(st.sets(st.sampled_from(sorted(batch.held)))) if batch.held else (), reverse=True)
        seeds = st.one_of(st.none(), st.integers(1, 99))
        added = list(data.draw(st.dictionaries(st.integers(0, 5), seeds, max_size=3)).items())
        held, moved = (set(batch.held) - set(removed)) | {i for i, _ in added}, []
        for _ in range(data.draw(st.integers(0, 3)) if held else 0):
            a, b = data.draw(st.sampled_from(sorted(held))), data.draw(st.integers(0, 5))
            moved.append((a, b, b in held))
            held = held if b in held else held - {a} | {b}
        batch.tell(len(held), removed, added, moved)
        batch.check()


def test_a_batch_without_thaws_requests_costs_nothing(v1: Any) -> None:
    ours = processor(v1)
    ours.update_state(update(v1, 1, added=[(0, params(v1, None), [1], [])]))
    logits = logits_of(v1, 0, 1)
    version = logits._version
    assert ours.apply(logits) is logits and logits._version == version
    assert not ours.is_argmax_invariant()


def test_equal_logits_go_to_the_lowest_id_and_nan_kills_nobody(v1: Any) -> None:
    ours = processor(v1)
    greedy = Sampling(temperature=0.0, presence_penalty=0.5)
    ours.update_state(update(v1, 3, added=[
        (0, params(v1, greedy), [1], []), (1, params(v1, Sampling(top_p=0.5)), [1], []),
        (2, params(v1, Sampling(min_tokens=2, stop_token_ids=tuple(range(VOCAB)))), [1], []),
    ]))  # fmt: skip
    logits = v1.torch.zeros(3, VOCAB)
    logits[0, [200, 17, 90]] = 2.0
    logits[1] = math.nan
    out = ours.apply(logits)
    assert [chosen(v1, out, i) for i in range(3)] == [17, 0, 0]


def test_without_ends_of_its_own_a_request_takes_vllms(v1: Any) -> None:
    extra = to_extra(Sampling(temperature=0.0, min_tokens=2), seed=1, output_start=0)
    asked = v1.SamplingParams(temperature=0.0, stop_token_ids=[5], extra_args={EXTRA: extra})
    asked.update_from_generation_config({"eos_token_id": [7, 8]}, 6)
    ours, output = processor(v1), []  # type: ignore[var-annotated]
    ours.update_state(update(v1, 1, added=[(0, asked, [], output)]))
    logits = v1.torch.zeros(1, VOCAB)
    logits[0, [5, 6, 7, 8]] = 3.0
    logits[0, 9] = 1.0
    assert chosen(v1, ours.apply(logits.clone()), 0) == 9
    output += [1, 2]
    assert chosen(v1, ours.apply(logits.clone()), 0) == 5


def test_a_bad_request_is_refused_at_admission(v1: Any) -> None:
    good = to_extra(Sampling(), seed=1, output_start=0)
    v1.ThawSampling.validate_params(v1.SamplingParams(temperature=0.7))
    v1.ThawSampling.validate_params(v1.SamplingParams(temperature=0.0, extra_args={EXTRA: good}))
    run = protocol.params(protocol.Run(id="0" * 32, record="1" * 32))
    told = {EXTRA: to_extra(Sampling(entropy=True), seed=1, output_start=0)}
    v1.ThawSampling.validate_params(v1.SamplingParams(temperature=0.0, extra_args={**told, "kv_transfer_params": run}))
    for nowhere in ({}, {"kv_transfer_params": protocol.params(protocol.Look(id="0" * 32))}):
        with pytest.raises(ValueError, match="entropy"):
            v1.ThawSampling.validate_params(v1.SamplingParams(temperature=0.0, extra_args={**told, **nowhere}))
    for value in GARBAGE.values():
        with pytest.raises(ValueError, match=EXTRA):
            v1.ThawSampling.validate_params(SimpleNamespace(extra_args={EXTRA: value}))
    for knob, value in (
        ("temperature", 0.7), ("repetition_penalty", 1.1), ("presence_penalty", 0.1), ("frequency_penalty", 0.1),
        ("logit_bias", {3: 1.0}), ("bad_words", ["a"]),
    ):  # fmt: skip
        asked = v1.SamplingParams(**{"temperature": 0.0, knob: value}, extra_args={EXTRA: good})
        with pytest.raises(ValueError, match=knob):
            v1.ThawSampling.validate_params(asked)


def test_a_bad_word_is_banned_where_its_first_tokens_stand_and_nowhere_else(v1: Any) -> None:
    sampling = Sampling(temperature=0.0, bad_words=("some",))
    logits = v1.torch.zeros(1, VOCAB)
    logits[0, 6], logits[0, 3], logits[0, 8] = 9.0, 8.0, 7.0
    for prompt, output, start, token in (
        ([1, 4], [5], 1, 8),  # 4 and 5 are the turn's: 6 may not come, 3 never
        ([1, 4, 5], [], 1, 8),  # resumed between 5 and 6
        ([1, 4, 5], [], 3, 6),  # of another turn
        ([1, 4], [5], 2, 6),
        ([1, 4], [5, 5], 1, 6),
    ):
        ours = processor(v1)
        ours.update_state(update(v1, 1, added=[(0, params(v1, sampling, 1, start), prompt, output)]))
        assert chosen(v1, ours.apply(logits.clone()), 0) == token


@pytest.fixture(scope="module")
def spaced() -> Any:
    """A tokenizer in which " the" and "the" are a token each, as real ones have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(["the cat the thing this other cats", "the\ncat\nthis\nthing"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.sampled_from("thecasing \n\té"), min_size=1, max_size=8).filter(str.lstrip), max_size=6))
def test_bad_words_are_the_token_ids_that_vllm_makes_of_them(v1: Any, spaced: Any, words: list[str]) -> None:
    words = list(dict.fromkeys(words))
    theirs = v1.SamplingParams(bad_words=words)
    theirs.update_from_tokenizer(SimpleNamespace(encode=spaced.encode, max_token_id=len(spaced) - 1))
    assert [list(ids) for ids in bad_ids(HFCodec(spaced), words)] == (theirs.bad_words_token_ids or [])


def test_some_bad_words_have_a_second_form(spaced: Any) -> None:
    assert len(bad_ids(HFCodec(spaced), ("the", "cat", "thingthing"))) > 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"speculative_config": object()}, "speculative"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ({"logprobs_mode": "processed_logprobs"}, "raw_logprobs"),
        ({"logits_processors": None}, "logits_processors"),
    ],
    ids=["speculative", "embeds", "processed logprobs", "entry point alone"],
)
def test_an_engine_whose_tokens_could_not_be_thaws_does_not_start(v1: Any, changes: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        v1.ThawSampling(config(**changes), v1.torch.device("cpu"), False)


def test_vllm_finds_the_class_by_its_name(v1: Any) -> None:
    assert v1.load([v1.QUALNAME]) == [v1.ThawSampling]


# --- the real engine

PROMPT = [random.Random(4).randrange(256) for _ in range(50)]
NUM, CUT = 20, 9
LOWER = tuple(range(160))
TURNS = {
    "plain": Sampling(),
    "filtered": Sampling(temperature=0.9, top_p=0.9, top_k=60, min_p=0.001),
    "penalised": Sampling(
        temperature=0.8, repetition_penalty=1.3, presence_penalty=0.6, frequency_penalty=0.5, min_tokens=14,
        stop_token_ids=LOWER,
    ),
    "counted": Sampling(temperature=0.7, top_p=0.95, presence_penalty=1.2, frequency_penalty=-0.8, min_tokens=14,
                        stop_token_ids=LOWER),
    "greedy": Sampling(temperature=0.0, frequency_penalty=1.5, repetition_penalty=1.2),
    "biased": Sampling(temperature=0.8, logit_bias=dict.fromkeys(range(97, 123), 20.0), repetition_penalty=1.1),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.fixture(scope="module")
def llm(v1: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """vLLM's offline engine with thaw's processor, its core in a process of its own."""
    from vllm import LLM

    from thaw.testing.models import make_random_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        model = make_random_model("qwen3", tmp_path_factory.mktemp("model"))
        engine = LLM(
            model=str(model), dtype="float32", max_model_len=256, max_num_seqs=16, enforce_eager=True,
            max_logprobs=VOCAB, logits_processors=[v1.QUALNAME],
        )  # fmt: skip
        yield engine
        engine.llm_engine.engine_core.shutdown()


def run(v1: Any, llm: Any, asked: list[tuple[list[int], dict[str, Any] | None, int]]) -> list[Any]:
    """The first completion of each of (prompt, thaw's extra or None for vLLM's own greedy, number of tokens)."""
    outs = llm.generate(
        [{"prompt_token_ids": tokens} for tokens, _, _ in asked],
        [
            v1.SamplingParams(
                temperature=0.0, max_tokens=num, ignore_eos=True, logprobs=VOCAB, detokenize=False,
                extra_args=None if extra is None else {EXTRA: extra},
            )
            for _, extra, num in asked
        ],
        use_tqdm=False,
    )  # fmt: skip
    return [out.outputs[0] for out in outs]


def rows_of(out: Any) -> list[list[float]]:
    return [[step[token].logprob for token in range(VOCAB)] for step in out.logprobs]


@pytest.mark.slow("runs vLLM itself")
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(v1: Any, llm: Any) -> None:
    start = len(PROMPT)
    extras = [to_extra(s, seed=77 + i, output_start=start) for i, s in enumerate(TURNS.values())]
    *whole, plain = run(v1, llm, [*((PROMPT, extra, NUM) for extra in extras), (PROMPT, None, NUM)])
    tokens = [list(out.token_ids) for out in whole]
    assert all(len(t) == NUM for t in tokens) and len({tuple(t) for t in tokens}) == len(TURNS)

    heads = [PROMPT + t[:CUT] for t in tokens]
    resumed = run(v1, llm, [(head, extra, NUM - CUT) for head, extra in zip(heads, extras, strict=True)])
    assert [list(out.token_ids) for out in resumed] == [t[CUT:] for t in tokens]

    # Control: a resumed request that has forgotten where its output began counts wrongly, and is another.
    lost = [to_extra(s, seed=77 + i, output_start=start + CUT) for i, s in enumerate(TURNS.values())]
    forgot = run(v1, llm, [(head, extra, NUM - CUT) for head, extra in zip(heads, lost, strict=True)])
    same = {name for name, out, t in zip(TURNS, forgot, tokens, strict=True) if list(out.token_ids) == t[CUT:]}
    assert same == {"plain", "filtered", "biased"}

    # min_tokens holds over the whole turn, and no longer.
    for name in ("penalised", "counted"):
        mine = tokens[list(TURNS).index(name)]
        assert not set(mine[:14]) & {*LOWER, EOS} and set(mine[14:]) & set(LOWER)

    # vLLM's own request in the same batch is what it is alone.
    (alone,) = run(v1, llm, [(PROMPT, None, NUM)])
    assert list(alone.token_ids) == list(plain.token_ids)

    # Log probabilities are the model's own: the greedy request's at the first step, and each row's sum is 1.
    raw = rows_of(plain)[0]
    for out in whole:
        rows = rows_of(out)
        assert rows[0] == pytest.approx(raw, abs=1e-4)
        assert all(math.fsum(map(math.exp, row)) == pytest.approx(1.0, abs=1e-4) for row in rows)

    # And from them the reference in plain Python chooses the same tokens (repetition_penalty depends on raw logits).
    for i, s in enumerate(TURNS.values()):
        if s.repetition_penalty == 1.0:
            for step, row in enumerate(rows_of(whole[i])):
                assert expected(row, s, 77 + i, PROMPT + tokens[i][:step], start) == tokens[i][step]


@pytest.mark.slow("runs vLLM itself")
def test_biases_and_bad_words_mean_what_vllm_means_by_them(v1: Any, llm: Any) -> None:
    """vLLM's own greedy request, and thaw's of the same parameters: the same tokens."""
    codec = HFCodec(llm.get_tokenizer())
    letters = {token: 30.0 + token % 3 for token in range(97, 123)}

    def both(**knobs: Any) -> list[str]:
        s = Sampling(temperature=0.0, **knobs)
        extra = to_extra(s, seed=1, output_start=len(PROMPT), bad_ids=bad_ids(codec, s.bad_words))
        (ours,) = run(v1, llm, [(PROMPT, extra, 60)])
        own = v1.SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, **knobs)
        (theirs,) = llm.generate([{"prompt_token_ids": PROMPT}], [own], use_tqdm=False)
        assert list(ours.token_ids) == list(theirs.outputs[0].token_ids)
        return [chr(token) for token in ours.token_ids]

    free = both(logit_bias=letters)
    assert set(free) <= {chr(token) for token in letters}
    assert both(logit_bias=letters, frequency_penalty=1.5, repetition_penalty=1.3) != free
    pairs = ["".join(free[i : i + 2]) for i in (3, 20)]
    words = [*pairs, free[40], "".join(free[8:11])]
    without = both(logit_bias=letters, bad_words=words)
    assert all(word in "".join(free) and word not in "".join(without) for word in words)


@pytest.mark.slow("runs vLLM itself")
def test_a_bad_extra_costs_its_own_request_and_not_the_engine(v1: Any, llm: Any) -> None:
    with pytest.raises(Exception, match=EXTRA):  # a ValueError or vLLM's own, by its version
        run(v1, llm, [(PROMPT, {"sampling": {"temperature": -1}}, 1)])
    (out,) = run(v1, llm, [(PROMPT, to_extra(Sampling(), seed=3, output_start=len(PROMPT)), 4)])
    assert len(out.token_ids) == 4
