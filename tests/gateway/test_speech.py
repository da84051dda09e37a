"""Calls of tools in a model's text: read as they come, in pieces of any size, and nothing is lost."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thaw.core.errors import InvalidRequest
from thaw.gateway.speech import Hermes, Said, Text, ToolCall, read_all, reader_of

CALL = '<tool_call>\n{"name": "ls", "arguments": {"path": "/"}}\n</tool_call>'
READ = ToolCall("ls", '{"path": "/"}')
PARTS = ["<", "<tool_call>", "</tool_call>", CALL, "x", "\n", "{", '{"name": "y"}', "<tool"]
BROKEN = ["<tool_call>{</tool_call>", '<tool_call>{"name": 1}</tool_call>', "<tool_call>[1]</tool_call>",
          '<tool_call>{"name": "x"', "<tool_call>"]  # fmt: skip


def in_pieces(text: str, size: int) -> list[Said]:
    reader, out = Hermes(), list[Said]()
    for i in range(0, len(text), size):
        out += reader.push(text[i : i + size])
    out += reader.end()
    merged: list[Said] = []
    for said in out:
        if isinstance(said, Text) and merged and isinstance(merged[-1], Text):
            merged[-1] = Text(merged[-1].text + said.text)
        else:
            merged.append(said)
    return merged


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_text_and_calls_are_told_apart(size: int) -> None:
    assert in_pieces(f"I look.{CALL}\n{CALL}", size) == [Text("I look."), READ, READ]
    assert in_pieces("a < b and <tool", size) == [Text("a < b and <tool")]


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_no_call_is_text(broken: str) -> None:
    assert in_pieces(f"so {broken} then", 3) == [Text(f"so {broken} then")]


@given(st.lists(st.sampled_from(PARTS)), st.integers(1, 9))
def test_pieces_decide_nothing_and_nothing_is_lost(parts: list[str], size: int) -> None:
    text = "".join(parts)
    told = in_pieces(text, size)
    assert told == read_all(Hermes(), text)
    kept = "".join(said.text for said in told if isinstance(said, Text))
    calls = [said for said in told if isinstance(said, ToolCall)]
    assert all(isinstance(json.loads(call.arguments), dict) for call in calls)
    if not calls:
        assert kept == text


def test_an_unknown_way_of_calling_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="hermes"):
        reader_of("gpt")
