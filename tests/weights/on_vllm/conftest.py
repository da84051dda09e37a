"""Engines here boot warm, as in `tests/engines/on_vllm`, and find thaw's loader by an entry point."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import warm
from entry import found, of_engines

ENTRY = ("vllm.general_plugins", "thaw_weights", "thaw.weights.vllm_loader:register")


@pytest.fixture(scope="session", autouse=True)
def loader_is_found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with found(tmp_path_factory.mktemp("entry"), *ENTRY):
        yield


if not warm._begun_with:  # nor are the engine's own tests in this run
    warm_boots = of_engines("on_vllm").warm_boots
