"""Receipts: what was sealed verifies, what was changed is found, what is hostile is refused in thaw's own words."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from receipt_samples import places, put, sample

from thaw import receipt as r
from thaw.core.errors import CorruptBlob, InvalidRequest, NewerFormat, NotFound, ThawError
from thaw.receipt import compute, schema, statistics
from thaw.receipt.format import MAX_BYTES

PLAIN: dict[str, Any] = json.loads(r.dumps(sample()))
LEAVES = list(places(PLAIN))
NUMBERS = [(path, value) for path, value in LEAVES if isinstance(value, (int, float)) and not isinstance(value, bool)]


def reseal(plain: dict[str, Any]) -> dict[str, Any]:
    """What somebody does who knows how the digest is made."""
    plain["digest"] = compute.digest_of(msgspec.convert(plain, r.Receipt))
    return plain


def passes(plain: dict[str, Any]) -> bool:
    """Whether `verify` finds nothing wrong; it may refuse in thaw's own words, and nothing else."""
    try:
        return r.verify(plain).ok
    except (CorruptBlob, NewerFormat):
        return False


def test_a_sealed_receipt_verifies_from_file_bytes_and_dict(tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    path.write_bytes(r.dumps(sample()))
    for source in (path, str(path), path.read_bytes(), PLAIN, sample()):
        found = r.verify(source)
        assert found.ok and found.problems == () and found.require() == sample()
    assert sample().ok


def test_equal_runs_give_equal_bytes() -> None:
    assert r.dumps(sample()) == r.dumps(sample())
    assert sample().digest == "b3:3b4ab44ecd65f36b63df53159e719d03fae840c53a00936644f198bfc060fe58"


def test_the_published_schema_is_the_code_and_accepts_receipts() -> None:
    assert schema.published() == json.loads(schema.dumps()), "write it anew: schema.dumps() into schema.json"
    jsonschema.Draft202012Validator.check_schema(schema.published())
    jsonschema.Draft202012Validator(schema.published()).validate(PLAIN)


@given(st.data())
def test_any_changed_number_is_found(data: st.DataObject) -> None:
    path, old = data.draw(st.sampled_from(NUMBERS))
    new = data.draw(st.one_of(st.integers(0, 1 << 53), st.floats(allow_nan=False, allow_infinity=False)))
    changed = copy.deepcopy(PLAIN)
    put(changed, path, new)
    if new == old:
        return
    assert not passes(changed)


@given(st.data())
def test_any_changed_leaf_is_found(data: st.DataObject) -> None:
    path, old = data.draw(st.sampled_from(LEAVES))
    new = data.draw(st.one_of(st.none(), st.booleans(), st.text(max_size=20), st.just([]), st.just({})))
    changed = copy.deepcopy(PLAIN)
    put(changed, path, new)
    if new == old:
        return
    assert not passes(changed)


@given(st.data())
def test_a_changed_figure_is_found_even_under_a_new_digest(data: st.DataObject) -> None:
    figures = [
        (path, value)
        for path, value in LEAVES
        if path[0] in ("derived", "checks", "goals")
        and path[-1] in ("value", "low", "high", "num_rounds", "num_checked", "num_equal", "held", "clear")
        and not isinstance(value, str)
    ]
    path, old = data.draw(st.sampled_from(figures))
    if isinstance(old, bool):
        new: Any = not old
    elif isinstance(old, int):
        new = data.draw(st.integers(1, 1 << 40).filter(lambda x: x != old))
    else:
        new = data.draw(st.floats(-1e9, 1e9).filter(lambda x: not math.isclose(x, old, rel_tol=1e-6)))
    changed = copy.deepcopy(PLAIN)
    put(changed, path, new)
    assert r.verify(reseal(changed)).problems


def test_raw_numbers_that_do_not_carry_the_figures_are_found_under_a_new_digest() -> None:
    changed = copy.deepcopy(PLAIN)
    changed["arms"][1]["rounds"][0]["values"]["first_token_s"] /= 2
    problems = " ".join(r.verify(reseal(changed)).problems)
    assert "gain" in problems and "digest" not in problems


@settings(max_examples=200)
@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_hostile_bytes_give_only_our_errors(data: bytes) -> None:
    with pytest.raises(ThawError):
        r.verify(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(sorted(PLAIN)), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200)
@given(st.data())
def test_hostile_values_anywhere_give_only_our_errors(data: st.DataObject) -> None:
    changed = copy.deepcopy(PLAIN)
    put(changed, data.draw(st.sampled_from(LEAVES))[0], data.draw(JSON))
    passes(changed)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"a":' * 1000 + b"1" + b"}" * 1000,
        b" " * (MAX_BYTES + 1),
        b'{"type":"thaw.receipt/1","type":"thaw.receipt/1"}',
        r.dumps(sample()).replace(b"2.2", b"1e999"),
        r.dumps(sample()).replace(b"2.2", b"NaN"),
        r.dumps(sample()).replace(b"2.2", b"9" * 5000),
        r.dumps(sample()).replace(b'"made up"', b'"\\ud800"'),
        b"\xff\xfe",
        b"null",
    ],
    ids=["list", "object", "huge", "doubled-name", "infinite", "nan", "digits", "surrogate", "utf-16", "null"],
)
def test_known_attacks_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptBlob):
        r.verify(data)


def test_a_newer_receipt_is_said_to_be_newer() -> None:
    with pytest.raises(NewerFormat, match="newer thaw"):
        r.verify({**PLAIN, "type": "thaw.receipt/2"})


def test_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        r.verify(tmp_path / "none.json")
    with pytest.raises(ThawError):
        r.verify(tmp_path)
    with pytest.raises(ThawError):
        r.verify("a\0b")


def test_questions_that_the_rounds_do_not_answer_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="no arm"):
        compute.derived(sample().arms, r.median("x", "x", "s", r.Term(arm="none", value="first_token_s")))
    with pytest.raises(InvalidRequest, match="has nothing"):
        compute.derived(sample().arms, r.median("x", "x", "s", r.Term(arm="slow", value="nothing")))
    with pytest.raises(InvalidRequest):
        sample(fast=(0.0, 0.1, 0.1))


def test_a_goal_is_held_when_its_interval_reaches_the_bound() -> None:
    held = {goal.name: goal.held for goal in sample(fast=(1.5, 1.6, 1.4)).goals}
    assert held == {"gain": False, "soon": False}
    gain = sample().number("gain")
    assert gain is not None and gain.low < gain.value < gain.high
    above = compute.goal((gain,), r.at_least("g", "g", "gain", (gain.value + gain.high) / 2))
    assert above.held and not above.clear


def test_the_interval_is_students_t_on_the_logarithms() -> None:
    """By hand: ratios 1, e, e² have mean log 1, sd 1; t(0.975, 2) = 4.302653."""
    value, low, high = statistics.ratio([1.0, math.e, math.e**2], [1.0, 1.0, 1.0])
    half = 4.302653 / math.sqrt(3)
    assert value == pytest.approx(math.e)
    assert (low, high) == (pytest.approx(math.exp(1 - half)), pytest.approx(math.exp(1 + half)))


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(i) for i in range(1, 25)]
    assert statistics.percentile(values, 95) == 23.0 and statistics.percentile(values[::-1], 100) == 24.0
    assert statistics.percentile([5.0], 50) == 5.0 and statistics.percentile(values, 0) == 1.0


def test_no_path_or_host_is_in_what_we_say_of_a_machine() -> None:
    import os
    import platform

    from thaw.receipt.machine import software, this_machine

    said = str(this_machine()) + str(software("msgspec", "no-such-package"))
    assert platform.node() not in said and os.getcwd() not in said
    assert "msgspec" in said and "no-such-package" not in said
