"""Engines here boot warm, as in `tests/engines/on_sglang`, and find thaw's loader by an entry point."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import warm
from entry import found, of_engines

ENTRY = ("sglang.srt.plugins", "thaw_weights", "thaw.weights.sglang_plugin:register")


@pytest.fixture(scope="session", autouse=True)
def loader_is_found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with found(tmp_path_factory.mktemp("entry"), *ENTRY):
        yield


if not warm._begun_with:  # nor are the engine's own tests in this run
    warm_boots = of_engines("on_sglang").warm_boots
