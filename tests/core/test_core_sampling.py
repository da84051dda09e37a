"""Sampling parameters: checked by type and range, whatever they come from."""

from __future__ import annotations

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
    "top_k": [-2, 1.5, "x", None, True],
    "min_p": [-0.1, 1.1, math.nan],
    "repetition_penalty": [0.0, -1.0, 101.0, math.inf],
    "presence_penalty": [-2.1, 2.1, math.nan],
    "frequency_penalty": [-2.1, 2.1, "0"],
    "stop": [5, ("",), (1,), ("a",) * 65, None, {"a": 1}],
    "stop_token_ids": [(-1,), (1.5,), "ab", 5, ("1",), None, (True,)],
    "ignore_eos": ["no", 2, None],
    "min_tokens": [-1, 300, 1.0, None, "1"],
    "max_tokens": [0, -1, 2.5, "x", None, True],
    "logprobs": [-1, 101, 1.5, "x", True],
    "seed": [-1, 1 << 64, 1.0, "1", True],
}
GOOD = {
    "temperature": [0, 0.0, 1, 100],
    "top_p": [1, 0.01],
    "top_k": [-1, 0, 1, 10**9],
    "stop": ["a", ("a", "b"), ["a"], ()],
    "stop_token_ids": [(), [1, 2], (0,)],
    "min_tokens": [0, 256],
    "logprobs": [None, 0, 100],
    "seed": [None, 0, (1 << 64) - 1],
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
