"""Bytes from anywhere: an object is what `encode` would have written, or one of thaw's own errors."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_core_golden import OBJECTS

from thaw.core import canonical, objects
from thaw.core.canonical import MAX_OBJECT_BYTES
from thaw.core.errors import CorruptBlob, NewerFormat, ThawError
from thaw.core.ids import digest

ENCODED = {name: objects.encode(value)[1] for name, value in OBJECTS.items()}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def survives(data: bytes) -> None:
    """Decoding `data` gives an object whose bytes are `data`, or an error of thaw's."""
    try:
        value = objects.decode(data, digest(data))
    except ThawError as error:
        assert len(str(error)) < 4000
        return
    assert objects.encode(value)[1] == data


@given(st.binary(max_size=200))
@example(b"")
@example(b"null")
@example(b"\xff\xfe")
@example(b"[" * 100_000)
@example('{"type":"thaw.state/\u00b2"}'.encode())
@example(b'{"type":"thaw.state/99999999999999999999"}')
@example(b'{"type":"thaw.commit/1","message":"\\ud800"}')
@example(b'{"type":5}')
@example(b'{"type":["thaw.state/1"]}')
def test_any_bytes(data: bytes) -> None:
    survives(data)


@given(JSON)
def test_any_json(value: object) -> None:
    survives(json.dumps(value).encode())


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(ENCODED)), st.data())
def test_any_field_of_a_real_object_replaced(name: str, data: st.DataObject) -> None:
    fields = json.loads(ENCODED[name])
    victim = data.draw(st.sampled_from(sorted(fields)))
    fields[victim] = data.draw(JSON)
    survives(canonical.encode(fields) if _is_safe(fields) else json.dumps(fields).encode())


@given(st.sampled_from(sorted(ENCODED)), st.data())
def test_any_byte_of_a_real_object_changed(name: str, data: st.DataObject) -> None:
    raw = bytearray(ENCODED[name])
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    survives(bytes(raw))


@pytest.mark.parametrize("name", ENCODED)
def test_an_object_is_what_its_id_says(name: str) -> None:
    raw = bytearray(ENCODED[name])
    raw[-2] ^= 1
    with pytest.raises(CorruptBlob, match="hash"):
        objects.decode(bytes(raw), digest(ENCODED[name]))


@pytest.mark.parametrize("name", ENCODED)
def test_another_spelling_of_the_same_object_is_refused(name: str) -> None:
    """One value has one id: spaces, another order or escapes would give it two."""
    fields = json.loads(ENCODED[name])
    for data in (
        json.dumps(fields).encode(),
        json.dumps(dict(reversed(fields.items())), separators=(",", ":"), ensure_ascii=False).encode(),
        ENCODED[name] + b" ",
    ):
        with pytest.raises(CorruptBlob):
            objects.decode(data, digest(data))


@pytest.mark.parametrize("name", ENCODED)
def test_a_newer_version_is_named_as_newer(name: str) -> None:
    fields = json.loads(ENCODED[name])
    fields["type"] = f"{fields['type'].partition('/')[0]}/9"
    data = canonical.encode(fields)
    with pytest.raises(NewerFormat, match="pgrade"):
        objects.decode(data, digest(data))


def test_the_size_is_checked_before_anything_is_read() -> None:
    data = b"x" * (MAX_OBJECT_BYTES + 1)
    with pytest.raises(CorruptBlob, match="at most"):
        objects.decode(data, digest(data))


def test_counts_that_do_not_add_up_are_refused() -> None:
    fields = json.loads(ENCODED["state"])
    fields["num_tokens"] = 5
    data = canonical.encode(fields)
    with pytest.raises(CorruptBlob, match="num_tokens"):
        objects.decode(data, digest(data))


@pytest.mark.parametrize("seed", ['"-1"', '"18446744073709551616"', '"01"', '"1e3"', '"\u0661"', '""', "5", '" 5"'])
def test_a_64_bit_integer_has_one_spelling(seed: str) -> None:
    data = ENCODED["state"].replace(b'"seed":"5"', f'"seed":{seed}'.encode())
    assert data != ENCODED["state"]
    with pytest.raises(CorruptBlob):
        objects.decode(data, digest(data))


def _is_safe(value: object) -> bool:
    """Whether RFC 8785 can write it."""
    try:
        canonical.encode(value)
    except Exception:  # noqa: BLE001 - only asked whether
        return False
    return True
