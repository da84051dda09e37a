"""Which releases of SGLang are taken without a word, warned of, and refused."""

from __future__ import annotations

import pytest

from thaw.core.errors import Unsupported
from thaw.engines.sglang import versions


@pytest.mark.parametrize("version", ["0.5.22", "0.5.23", "0.5.23+cpu"])
def test_the_tested_releases_are_taken_without_a_word(version: str) -> None:
    assert versions.notes(version) == []


@pytest.mark.parametrize("version", ["0.5.24", "0.6.0", "0.5.23rc1", "main"])
def test_others_are_warned_of_by_name(version: str) -> None:
    (found,) = versions.notes(version)
    assert version in found and "0.5.22 and 0.5.23" in found


def test_older_ones_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"0\.5\.21 is too old"):
        versions.notes("0.5.21")


def test_a_refusal_is_never_answered_as_if_it_had_run() -> None:
    """0.5.22 says 200 to what ends with a status that it does not know."""
    statuses = (400, 404, 409, 429, 500)
    assert [versions.reply_status(status, "0.5.23") for status in statuses] == list(statuses)
    assert [versions.reply_status(status, "0.5.22") for status in statuses] == [400, 400, 400, 503, 500]
    assert versions.reply_status(404, "0.6.0.dev1") == 404
