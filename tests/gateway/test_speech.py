"""Calls of tools in a model's text: read as they come, in pieces of any size, and nothing is lost."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thaw.core.errors import InvalidRequest
from thaw.gateway.reading import SpeechReaders
from thaw.gateway.speech import Hermes, Said, Text, TextReader, TextReaders, Thought, ToolCall, merged_said, read_all

CALL = '<tool_call>\n{"name": "ls", "arguments": {"path": "/"}}\n</tool_call>'
READ = ToolCall("ls", '{"path": "/"}')
PARTS = ["<", "<tool_call>", "</tool_call>", CALL, "x", "\n", "{", '{"name": "y"}', "<tool"]
BROKEN = ["<tool_call>{</tool_call>", '<tool_call>{"name": 1}</tool_call>', "<tool_call>[1]</tool_call>",
          '<tool_call>{"name": "x"', "<tool_call>"]  # fmt: skip


def in_pieces(text: str, size: int, reader: TextReader | None = None) -> list[Said]:
    reader, out = reader or Hermes(), list[Said]()
    for i in range(0, len(text), size):
        out += reader.push(text[i : i + size])
    return merged_said([*out, *reader.end()])


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


@pytest.mark.parametrize(
    ("tools", "reasoning", "why"),
    [
        ("gpt", "none", "hermes"),
        ("none", "hermes", "think"),
        ("vllm:", "none", "vllm:NAME"),
        ("other:x", "none", "sglang:NAME"),
        ("vllm:hermes", "think", "one engine for both"),
        ("vllm:hermes", "sglang:qwen3", "one engine for both"),
    ],
)
def test_unknown_ways_of_speaking_are_refused(tools: str, reasoning: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        SpeechReaders(tools, reasoning, "python3", "model")


# -- thoughts


def both(*, opened: bool) -> TextReaders:
    return TextReaders("hermes", "think", opened=opened)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_thoughts_come_before_text_and_calls(size: int) -> None:
    whole = [Thought("so\n< a"), Text("I look."), READ]
    assert in_pieces(f"<think>\nso\n< a\n</think>\n\nI look.{CALL}", size, both(opened=False)) == whole
    assert in_pieces(f"so\n< a\n</think>\n\nI look.{CALL}", size, both(opened=True)) == whole
    assert in_pieces("<think>\n\n</think>\n\nyes", size, both(opened=False)) == [Text("yes")]
    assert in_pieces("no <think>x</think>", size, both(opened=False)) == [Text("no <think>x</think>")]
    assert in_pieces("<think>cut", size, both(opened=False)) == [Thought("cut")]
    assert in_pieces("  <thin", size, both(opened=False)) == [Text("  <thin")]
    assert in_pieces(f"<think>{CALL}</think>", size, both(opened=False)) == [Thought(CALL)]


@given(st.lists(st.sampled_from([*PARTS, "<think>", "</think>", "</th"])), st.integers(1, 9), st.booleans())
def test_pieces_decide_nothing_of_thoughts(parts: list[str], size: int, opened: bool) -> None:
    text = "".join(parts)
    assert in_pieces(text, size, both(opened=opened)) == read_all(both(opened=opened), text)
