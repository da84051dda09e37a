"""vLLM's parsers (`--tool-call-parser`, `--reasoning-parser`), as its own server uses them. Needs vLLM 0.32."""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.parser_manager import ParserManager
from vllm.tokenizers import get_tokenizer

from thaw.gateway.parsers.child import CallParts, said_of
from thaw.gateway.parsers.wire import OpenParse
from thaw.gateway.speech import Said, ToolCall


class VllmParsers:
    def __init__(self, model: str, tools: str, reasoning: str) -> None:
        self._tokenizer, self._calls = get_tokenizer(model), bool(tools)
        self._class = ParserManager.get_parser(
            tool_parser_name=tools or None,
            reasoning_parser_name=reasoning or None,
            enable_auto_tools=bool(tools),
            model_name=model,
            tokenizer=self._tokenizer,
        )

    def open(self, opened: OpenParse) -> _Parser:
        request = ChatCompletionRequest(
            messages=[{"role": "user", "content": ""}],
            tools=list(opened.tools) or None,
            tool_choice="auto" if opened.tools else "none",
            chat_template_kwargs=opened.variables,
        )
        parser = self._class(self._tokenizer, request.tools, chat_template_kwargs=opened.variables)
        parser.set_prompt_token_ids(list(opened.prompt_ids))
        return _Parser(parser, request, list(opened.prompt_ids), calls=self._calls)


class _Parser:
    def __init__(self, parser: Any, request: Any, prompt_ids: list[int], *, calls: bool) -> None:
        self._parser, self._request, self._prompt_ids, self._calls = parser, request, prompt_ids, calls
        self._parts = CallParts()

    def push(self, text: str, token_ids: list[int], *, finished: bool) -> list[Said]:
        told = self._parser.parse_delta(text, token_ids, self._request, self._prompt_ids, finished=finished)
        out: list[Said] = []
        if told is not None:
            out += said_of(told.reasoning, told.content)
            for call in told.tool_calls or ():
                function = call.function
                out += self._parts.add(
                    call.index, function.name if function else None, function.arguments if function else None
                )
        return out + self._parts.end() if finished else out

    def whole(self, text: str, token_ids: list[int]) -> list[Said]:
        reasoning, content, calls = self._parser.parse(
            text, self._request, enable_auto_tools=self._calls, model_output_token_ids=token_ids
        )
        return [*said_of(reasoning, content), *(ToolCall(call.name, call.arguments) for call in calls or ())]


PARSERS = VllmParsers
