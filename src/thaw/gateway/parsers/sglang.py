"""SGLang's parsers (`--tool-call-parser`, `--reasoning-parser`), as its own server uses them."""

from __future__ import annotations

from typing import Any

from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.parser.reasoning_parser import ReasoningParser
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from thaw.gateway.parsers.child import CallParts, said_of
from thaw.gateway.parsers.wire import OpenParse
from thaw.gateway.speech import Said, ToolCall


class SglangParsers:
    def __init__(self, model: str, tools: str, reasoning: str) -> None:
        self._tools, self._reasoning = tools, reasoning
        self._tokenizer = get_tokenizer(model)
        self.open(OpenParse(0, (), {}, (), ""))  # an unknown name is an error now

    def open(self, opened: OpenParse) -> _Parser:
        calls = thoughts = None
        if self._tools:
            tools = [Tool(**tool) for tool in opened.tools]
            calls = FunctionCallParser(tools, self._tools, tokenizer=self._tokenizer)
        if self._reasoning:
            thoughts = self._thoughts(opened, None)
            if opened.tail.rstrip().endswith(getattr(thoughts.detector, "think_start_token", None) or "\0"):
                thoughts = self._thoughts(opened, True)
        return _Parser(calls, thoughts)

    def _thoughts(self, opened: OpenParse, force: bool | None) -> Any:
        return ReasoningParser(
            self._reasoning, True, force, tokenizer=self._tokenizer,
            tool_call_parser_active=bool(self._tools and opened.tools),
        )  # fmt: skip


class _Parser:
    def __init__(self, calls: Any, thoughts: Any) -> None:
        self._calls, self._thoughts = calls, thoughts
        self._parts = CallParts()

    def push(self, text: str, token_ids: list[int], *, finished: bool) -> list[Said]:
        out = self._thought(text, self._thoughts.parse_stream_chunk if self._thoughts else None)
        if finished:
            if self._thoughts:
                out += self._thought("", lambda _: self._thoughts.parse_stream_end())
            if self._calls:
                out += self._told(*self._calls.parse_stream_end())
            out += self._parts.end()
        return out

    def _thought(self, text: str, parse: Any) -> list[Said]:
        thought, text = parse(text) if parse else (None, text)
        told = self._told(*self._calls.parse_stream_chunk(text)) if self._calls and text else said_of(None, text)
        return [*said_of(thought, None), *told]

    def _told(self, text: str, calls: Any) -> list[Said]:
        out = said_of(None, text)
        for call in calls:
            out += self._parts.add(call.tool_index, call.name, call.parameters)
        return out

    def whole(self, text: str, token_ids: list[int]) -> list[Said]:
        thought, text = self._thoughts.parse_non_stream(text) if self._thoughts else (None, text)
        content, calls = self._calls.parse_non_stream(text or "") if self._calls else (text, [])
        return [*said_of(thought, content), *(ToolCall(call.name or "", call.parameters) for call in calls)]


PARSERS = SglangParsers
