"""An API key is checked before it is sent: one that no HTTP header can carry is refused, and never shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import thaw
from thaw.core.errors import InvalidRequest
from thaw.engines.keys import VARIABLE, api_key, check_key
from thaw.engines.registry import OWN, kind_of
from thaw.serve import command as serving

WRONG = {"é": "00E9", "secret\n": "000A", " ": "0020", "secret ": "0020", "\udcff": "DCFF", "\0": "0000"}
"""Each with the character that is wrong in it."""
URL = "http://127.0.0.1:9"
VARIABLES = [variable for name in OWN if (variable := kind_of(name).key_variable) is not None]
"""In which thaw's own kinds of engine look for a key."""


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1).map(str.strip).filter(bool))
def test_printable_ascii_is_a_key(key: str) -> None:
    assert check_key(key, "api_key") == key


@given(st.text(min_size=1))
def test_every_key_that_passes_is_sent_as_it_is(key: str) -> None:
    try:
        check_key(key, "api_key")
    except InvalidRequest as error:
        assert len(key) < 3 or key not in str(error)
    else:
        assert key.isascii() and key.isprintable() and key == key.strip()


@pytest.mark.parametrize("key", WRONG)
@pytest.mark.parametrize("variable", VARIABLES)
def test_a_key_that_cannot_be_sent_is_refused_wherever_it_comes_from(
    variable: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (VARIABLE, *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InvalidRequest, match=rf"api_key is no API key.*U\+{WRONG[key]}"):
        api_key(variable, key)
    with pytest.raises(InvalidRequest, match="api_key is no API key"):
        thaw.attach(URL, api_key=key)
    with pytest.raises(InvalidRequest, match="--api-key is no API key"):
        serving.require_keys(("--port", "1", "--api-key", "good", key, "--enforce-eager"))
    with pytest.raises(InvalidRequest, match="--api-key is no API key"):
        serving.require_keys((f"--api-key={key}",))
    if "\0" in key:  # no variable holds it
        return
    for name in (variable, VARIABLE):
        monkeypatch.setenv(name, key)
        with pytest.raises(InvalidRequest, match=f"{name} is no API key"):
            api_key(variable)
    assert api_key(variable, "given") == "given"


def test_an_empty_key_is_none_and_the_next_source_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setenv("VLLM_API_KEY", "of-vllm")
    monkeypatch.delenv("SGLANG_API_KEY", raising=False)
    assert api_key("VLLM_API_KEY", "") == "of-vllm"
    assert api_key("SGLANG_API_KEY") is None and api_key(None) is None
    serving.require_keys(("--api-key", "good", "--", "é"))
