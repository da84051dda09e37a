"""Engines here boot warm, as in `tests/engines/on_sglang`, and find the tier of what lands by an entry point."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import warm
from entry import found, of_engines

ENTRY = ("thaw.tiers", "landing", "thaw.remote.landing:open_landing")


@pytest.fixture(scope="session", autouse=True)
def tier_is_found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with found(tmp_path_factory.mktemp("tier"), *ENTRY):
        yield


if not warm._begun_with:  # nor are the engine's own tests in this run
    warm_boots = of_engines("on_sglang").warm_boots
