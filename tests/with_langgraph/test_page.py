"""docs/langgraph.md: its first program runs as it stands, over the fake engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "langgraph.md").read_text(encoding="utf-8")


def test_the_program_of_the_page_prefills_no_prefix_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.search(r"```python\n(.*?)```", PAGE, re.S)
    assert found is not None
    monkeypatch.chdir(tmp_path)
    place: dict[str, Any] = {}
    exec(found[1].replace('"transformers", model="path/to/model"', '"fake"'), place)
    history = list(place["app"].get_state_history(place["thread"]))
    travelled = history[0].values["messages"]
    assert [one.content for one in travelled if one.type == "human"] == ["A long document …", "How?"]
    said = travelled[-1].response_metadata["thaw"]
    assert said["source"] == "live" and said["prefilled_tokens"] < 30 < said["cached_tokens"]
    place["model"].close()
    place["repo"].engine.close()
