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
