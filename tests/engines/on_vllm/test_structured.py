"""Structured output goes on in the middle: a resumed completion is the uninterrupted one, children obey the grammar.

The control is a grammar that begins anew after the tokens that are there already: what it allows is something else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from thaw.core.errors import BadSampling, InvalidRequest
from thaw.core.sampling import Sampling, StructuredOutputs
from thaw.engines import load_engine
from thaw.engines.base import Completion, Engine, GenerateRequest
from thaw.repo.params import as_sampling
from thaw.testing.laws.kit import LIMIT_S, Lab, bits
from thaw.testing.plans import mount_at

pytest.importorskip("vllm")

REGEX = r"[a-d]{2}(-[0-9]{3}){40}\.end"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "names": {"type": "array", "items": {"type": "string", "maxLength": 8}, "minItems": 12, "maxItems": 12},
        "open": {"type": "boolean"},
    },
    "required": ["names", "open"],
    "additionalProperties": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "regex": {"regex": REGEX},
    "json": {"json": SCHEMA},
    "choice": {"choice": ["the first of all these words", "the second of all these words"]},
    "grammar": {"grammar": 'root ::= item{20} "."\nitem ::= "<" [xyz]+ ">"'},
}


def sampling(kind: str, **changes: Any) -> Sampling:
    fields: dict[str, Any] = {"temperature": 1.0, "max_tokens": 400, "seed": 11, "structured_outputs": KINDS[kind]}
    return Sampling(**{**fields, **changes})


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    model = tiny_model("llama", dtype="bfloat16", head_dim=64)
    with load_engine("vllm", model=str(model), enforce_eager=True, max_model_len=2048) as booted:
        yield booted


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(mount_at(tmp_path_factory.mktemp("packs")))


def equal(one: Completion, two: Completion) -> None:
    assert one.token_ids == two.token_ids and one.text == two.text
    assert bits(one.logprobs) == bits(two.logprobs) and one.finish_reason == two.finish_reason


def fits(kind: str, text: str) -> bool:
    """Prompts of random tokens may end inside a character; its rest stands before what the grammar shapes."""
    text = text.removeprefix("\ufffd")
    if kind == "regex":
        return re.fullmatch(REGEX, text) is not None
    if kind == "choice":
        return text in KINDS[kind]["choice"]
    if kind == "grammar":
        return re.fullmatch(r"(<[xyz]+>){20}\.", text) is not None
    said = json.loads(text, strict=False)  # a random model writes control characters
    return len(said["names"]) == 12 and isinstance(said["open"], bool)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"temperature": 0.0}, {"frequency_penalty": 0.5, "top_k": 20}],
                         ids=["seeded", "greedy", "penalised"])  # fmt: skip
def test_a_resumed_completion_is_the_uninterrupted_one(
    engine: Engine, lab: Lab, kind: str, more: dict[str, Any]
) -> None:
    wanted = sampling(kind, **more)
    session = lab.begin(engine, 100, start=3)
    after = 3 if kind == "choice" else 20
    twin, cut, whole = lab.stopped_amid(engine, session, after=after, samplings=[wanted] * 5)
    if whole.finish_reason == "stop":
        assert fits(kind, whole.text), whole.text
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    equal(lab.resume(engine, twin)[0], whole)


def test_captured_while_it_runs_it_goes_on_where_it_was(engine: Engine, lab: Lab) -> None:
    session = lab.begin(engine, 300, start=4)
    captured, whole = lab.captured_amid(engine, session, after=15, samplings=[sampling("regex")] * 5)
    assert fits("regex", whole.text)
    plan = lab.plan(captured)
    equal(lab.resume(engine, lab.hydrate(engine, plan).session)[0], whole)
    turns = list(plan.turns)
    other = msgspec.structs.replace(turns[-1].sampling, structured_outputs=StructuredOutputs(regex="[0-9]+"))
    turns[-1] = msgspec.structs.replace(turns[-1], sampling=other)
    strange = lab.hydrate(engine, msgspec.structs.replace(plan, turns=tuple(turns))).session
    with pytest.raises(InvalidRequest, match="grammar does not allow"):
        lab.resume(engine, strange)
    assert engine.stats()["running"] == 0  # type: ignore[attr-defined]


def test_children_from_its_middle_obey_the_grammar_each_its_own_way(engine: Engine, lab: Lab) -> None:
    session = lab.begin(engine, 300, start=5)
    half, _, _ = lab.stopped_amid(engine, session, after=30, samplings=[sampling("regex", seed=None)] * 5)
    kids = lab.fork(engine, half, 4, at=320)
    texts = [out.text for out in lab.resume(engine, *kids)]
    assert all(fits("regex", text) for text in texts) and len(set(texts)) > 1
    begun = engine.view(half).turns[-1].text
    assert all(text.startswith(begun[:20]) for text in texts)


def test_a_grammar_that_began_anew_would_allow_something_else(engine: Engine, lab: Lab) -> None:
    """The control: the same tokens as a prompt, and the same grammar."""
    session = lab.begin(engine, 300, start=6)
    _, cut, _ = lab.stopped_amid(engine, session, after=30, samplings=[sampling("regex")] * 5)
    fresh = lab.begin(engine, 300, start=6)
    out = lab.one(engine, fresh, sampling("regex"), cut.token_ids)
    assert fits("regex", out.text) and not fits("regex", cut.text + out.text)


def test_beside_plain_sessions_each_has_its_own_rule(engine: Engine, lab: Lab) -> None:
    sessions = [lab.begin(engine, 100, start=7 + i) for i in range(3)]
    rules = [sampling("regex"), Sampling(max_tokens=30, temperature=0.0), sampling("json")]
    asked = [GenerateRequest(session=s, sampling=rule) for s, rule in zip(sessions, rules, strict=True)]
    outs = engine.generate(asked).result(LIMIT_S)
    assert fits("regex", outs[0].text) and len(outs[1].token_ids) == 30
    assert outs[2].finish_reason == "length" or fits("json", outs[2].text)


def test_what_is_no_grammar_is_refused_and_the_session_stays(engine: Engine, lab: Lab) -> None:
    session = lab.begin(engine, 100, start=12)
    with pytest.raises(InvalidRequest):
        lab.one(engine, session, Sampling(structured_outputs={"regex": "(("}))  # type: ignore[arg-type]
    assert len(lab.one(engine, session, Sampling(max_tokens=3, temperature=0.0)).token_ids) == 3


def test_vllms_own_parameters_mean_the_same() -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    for given in KINDS.values():
        asked = SamplingParams(seed=1, structured_outputs=StructuredOutputsParams(**given))
        assert as_sampling(asked) == Sampling(seed=1, max_tokens=16, structured_outputs=given)  # type: ignore[arg-type]
    beyond = StructuredOutputsParams(regex="a+", disable_any_whitespace=True)
    with pytest.raises(BadSampling, match=r"structured_outputs\.disable_any_whitespace=True"):
        as_sampling(SamplingParams(structured_outputs=beyond))
