"""Sampling parameters: checked by type and range, whatever they come from."""

from __future__ import annotations

import json
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thaw.core import canonical
from thaw.core.canonical import U64
from thaw.core.errors import BadSampling, ThawError
from thaw.core.sampling import Sampling

BAD = {
    "temperature": [-0.1, 100.1, math.nan, math.inf, "1", None, True, [1]],
    "top_p": [0.0, -0.5, 1.1, math.nan, "x"],
    "top_k": [-2, 1.5, "x", None, True, 1 << 53],
    "min_p": [-0.1, 1.1, math.nan],
    "repetition_penalty": [0.0, -1.0, 101.0, math.inf],
    "presence_penalty": [-2.1, 2.1, math.nan],
    "frequency_penalty": [-2.1, 2.1, "0"],
    "stop": [5, ("",), (1,), ("a",) * 65, None, {"a": 1}],
    "stop_token_ids": [(-1,), (1.5,), "ab", 5, ("1",), None, (True,), (1 << 53,)],
    "ignore_eos": ["no", 2, None],
    "entropy": ["yes", 1, None],
    "min_tokens": [-1, 300, 1.0, None, "1"],
    "max_tokens": [0, -1, 2.5, "x", None, True, 1 << 53],
    "logprobs": [-1, 101, 1.5, "x", True],
    "seed": [-1, 1 << 64, 1.0, "1", True],
    "logit_bias": [
        None, 5, "5", [5], {-1: 1.0}, {"x": 1.0}, {"٣": 1.0}, {1.0: 1.0}, {True: 1.0}, {5: 100.1}, {5: -100.1},
        {5: "1"}, {5: True}, {5: math.nan}, {5: None}, {5: 1.0, "5": 2.0}, [(5, 1.0), (5, 2.0)], {1 << 32: 1.0},
        {"9" * 5000: 1.0},
        dict.fromkeys(range(1025), 1.0),
    ],
    "structured_outputs": [
        5, "a", {}, {"regex": "a", "json": "{}"}, {"regex": 5}, {"choice": "ab"}, {"choice": []}, {"xml": "a"},
        {"json": [1]}, {"regex": "a" * ((1 << 20) + 1)},
    ],
    "bad_words": [5, ("",), (" ",), ("\n\t",), (1,), ("a",) * 65, None, {"a": 1}],
}  # fmt: skip
GOOD = {
    "temperature": [0, 0.0, 1, 100],
    "top_p": [1, 0.01],
    "top_k": [-1, 0, 1, 10**9, (1 << 53) - 1],
    "stop": ["a", ("a", "b"), ["a"], ()],
    "stop_token_ids": [(), [1, 2], (0,), ((1 << 53) - 1,)],
    "min_tokens": [0, 256],
    "max_tokens": [1, (1 << 53) - 1],
    "entropy": [True, False],
    "logprobs": [None, 0, 100],
    "seed": [None, 0, (1 << 64) - 1],
    "logit_bias": [{}, {5: 1}, {5: -100.0, 0: 100}, {"17": 0.25}, [(3, 1.0)], [[3, 1]], {i: 1 for i in range(1024)}],
    "bad_words": ["a", ("a", " b"), ["a"], ()],
    "structured_outputs": [None, {"regex": "a+"}, {"json": {"type": "object"}}, {"choice": ["a", "b"]}],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_a_bad_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(BadSampling, match=name):
        Sampling(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in GOOD.items() for v in values])
def test_a_good_value_is_taken(name: str, value: object) -> None:
    sampling = Sampling(**{name: value})  # type: ignore[arg-type]
    assert canonical.decode(canonical.encode(sampling), Sampling) == sampling


def test_every_field_is_tested() -> None:
    assert set(BAD) == {field.name for field in msgspec.structs.fields(Sampling)}


def test_an_unknown_option_is_an_error() -> None:
    with pytest.raises(TypeError):
        Sampling(temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(ThawError):
        canonical.decode(b'{"temprature":1}', Sampling)


def test_a_single_stop_string_is_one_and_not_its_letters() -> None:
    assert Sampling(stop="ab").stop == ("ab",)  # type: ignore[arg-type]
    assert Sampling(stop=["ab", "c"]).stop == ("ab", "c")  # type: ignore[arg-type]


def test_biases_are_kept_in_one_form() -> None:
    forms = ({7: 1, 3: -2}, {"3": -2.0, "7": 1.0}, [(7, 1.0), (3, -2.0)], ((3, -2.0), (7, 1.0)))
    samplings = [Sampling(logit_bias=form) for form in forms]  # type: ignore[arg-type]
    assert {sampling.logit_bias for sampling in samplings} == {((3, -2.0), (7, 1.0))} and len(set(samplings)) == 1
    assert canonical.encode(samplings[0]) == b'{"logit_bias":[[3,-2],[7,1]]}'
    assert Sampling(bad_words="ab").bad_words == ("ab",)  # type: ignore[arg-type]


def test_stored_biases_in_another_order_are_refused() -> None:
    with pytest.raises(ThawError, match="canonical"):
        canonical.decode(b'{"logit_bias":[[7,1],[3,-2]]}', Sampling)


def test_what_is_not_asked_for_is_not_written() -> None:
    """So an object's id is what it was before these fields were there."""
    assert canonical.encode(Sampling(logit_bias={}, bad_words=[])) == b"{}"  # type: ignore[arg-type]


def test_equal_sampling_has_equal_bytes() -> None:
    one, two = Sampling(temperature=1, seed=5), Sampling(temperature=1.0, seed=U64(5))  # type: ignore[arg-type]
    assert one == two and canonical.encode(one) == canonical.encode(two)
    assert canonical.encode(Sampling(seed=5)) == b'{"seed":"5"}'  # type: ignore[arg-type]


JUNK = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers() | st.text(max_size=3), max_size=3)
)


@given(st.dictionaries(st.sampled_from(sorted(BAD)), JUNK, max_size=4))
def test_hostile_parameters_meet_only_thaws_own_errors(values: dict[str, object]) -> None:
    try:
        sampling = Sampling(**values)  # type: ignore[arg-type]
    except ThawError:
        return
    assert canonical.decode(canonical.encode(sampling), Sampling) == sampling


def test_structured_outputs_are_kept_in_one_form_and_left_out_by_default() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    one, two = (Sampling(structured_outputs={"json": form}) for form in (schema, json.dumps(schema)))  # type: ignore[arg-type]
    assert one == two and canonical.decode(canonical.encode(one), Sampling) == one
    assert one.structured_outputs is not None and json.loads(one.structured_outputs.json or "") == schema
    assert list(json.loads(one.structured_outputs.json or "")["properties"]) == ["b", "a"], "the order matters"
    assert canonical.encode(Sampling(structured_outputs=None)) == b"{}"


@pytest.mark.parametrize("beside", [{"ignore_eos": True}, {"min_tokens": 2}])
def test_what_would_keep_structured_output_from_its_end_is_refused(beside: dict[str, object]) -> None:
    with pytest.raises(BadSampling, match=next(iter(beside))):
        Sampling(structured_outputs={"regex": "a"}, **beside)  # type: ignore[arg-type]
