"""The glossary's words of vLLM are words of the vLLM that is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import glossary


def test_each_word_of_the_glossary_is_in_its_source() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    assert glossary.unknown(glossary.names(glossary.VLLM), Path(spec.origin).parent) == set()
