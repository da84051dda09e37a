"""Calls of tools and thoughts over each API, with the stock clients; forced calls; log probabilities in streams."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gateway_stand import Gateway, Start
from reciting import reciting, say
from thaw.gateway.settings import GatewaySettings

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
CALL = '<tool_call>\n{"name": "ls", "arguments": {"path": "/"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "cat", "arguments": {"path": "/etc"}}\n</tool_call>'
ANSWER = f"<think>\nI should look.\n</think>\n\nLet me see.\n{CALL}\n{OTHER}"
SETTINGS = GatewaySettings(tools="hermes", reasoning="think")
FUNCTIONS = [
    {"name": name, "parameters": {"type": "object", "properties": {"path": {"type": "string"}}}}
    for name in ("ls", "cat")
]
CHAT_TOOLS = [{"type": "function", "function": one} for one in FUNCTIONS]
TOOLS = [{"type": "function", **one} for one in FUNCTIONS]
ANTHROPIC_TOOLS = [{"name": one["name"], "input_schema": one["parameters"]} for one in FUNCTIONS]
LS, CAT = ("ls", {"path": "/"}), ("cat", {"path": "/etc"})


@pytest.fixture
def speaking(start: Start) -> Iterator[Callable[..., Gateway]]:
    engines = []

    def begin(**options: Any) -> Gateway:
        engines.append(reciting(**options))
        return start(engine=engines[-1], settings=SETTINGS)

    yield begin
    for engine in engines:
        engine.close()


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": say(text)}]


def chat(gateway: Gateway, text: str, **more: Any) -> Any:
    return gateway.openai().chat.completions.create(model="fake", messages=user(text), tools=CHAT_TOOLS, **more)


def respond(gateway: Gateway, text: str, **more: Any) -> Any:
    return gateway.openai().responses.create(model="fake", input=say(text), tools=TOOLS, **more)


def message(gateway: Gateway, text: str, **more: Any) -> Any:
    return gateway.anthropic().messages.create(
        model="fake", messages=user(text), tools=ANTHROPIC_TOOLS, max_tokens=400, **more
    )


def chat_calls(calls: Any) -> list[tuple[str, Any]]:
    return [(one.function.name, json.loads(one.function.arguments)) for one in calls or ()]


def test_thoughts_text_and_calls_in_chat(speaking: Callable[..., Gateway]) -> None:
    gateway = speaking()
    reply = chat(gateway, ANSWER).choices[0]
    assert reply.message.reasoning_content == reply.message.reasoning == "I should look."
    assert reply.message.content.strip() == "Let me see."
    assert chat_calls(reply.message.tool_calls) == [LS, CAT] and reply.finish_reason == "tool_calls"
    thought, text, calls = "", "", list[Any]()
    for chunk in chat(gateway, ANSWER, stream=True):
        delta = chunk.choices[0].delta
        thought += getattr(delta, "reasoning_content", None) or ""
        text += delta.content or ""
        calls += delta.tool_calls or ()
        last = chunk.choices[0].finish_reason
    assert (thought, text) == (reply.message.reasoning_content, reply.message.content)
    assert chat_calls(calls) == [LS, CAT] and [one.index for one in calls] == [0, 1] and last == "tool_calls"


def test_thoughts_text_and_calls_in_responses(speaking: Callable[..., Gateway]) -> None:
    gateway = speaking()
    reply = respond(gateway, ANSWER)
    assert [one.type for one in reply.output] == ["reasoning", "message", "function_call", "function_call"]
    assert reply.output[0].content[0].text == "I should look." and reply.output_text.strip() == "Let me see."
    assert [(one.name, json.loads(one.arguments)) for one in reply.output[2:]] == [LS, CAT]
    assert reply.usage.output_tokens_details.reasoning_tokens == len("I should look.")
    events = list(respond(gateway, ANSWER, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert thought == "I should look."
    done = [event.item.type for event in events if event.type == "response.output_item.done"]
    assert done == [one.type for one in reply.output] == [one.type for one in events[-1].response.output]
    again = list(gateway.openai().responses.retrieve(events[-1].response.id, stream=True))
    assert [(e.type, getattr(e, "delta", None)) for e in again] == [(e.type, getattr(e, "delta", None)) for e in events]
    with gateway.openai().responses.stream(model="fake", input=say(ANSWER), tools=TOOLS) as stream:
        assert [one.type for one in stream.get_final_response().output] == done


def test_thoughts_text_and_calls_in_messages(speaking: Callable[..., Gateway]) -> None:
    gateway = speaking()
    reply = message(gateway, ANSWER)
    assert [one.type for one in reply.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert reply.content[0].thinking == "I should look." and reply.content[0].signature
    assert [(one.name, one.input) for one in reply.content[2:]] == [LS, CAT] and reply.stop_reason == "tool_use"
    with gateway.anthropic().messages.stream(
        model="fake", messages=user(ANSWER), tools=ANTHROPIC_TOOLS, max_tokens=400
    ) as stream:
        final = stream.get_final_message()
    assert [one.type for one in final.content] == [one.type for one in reply.content]
    assert final.content[0].thinking == "I should look." and final.content[0].signature
    assert [(one.name, one.input) for one in final.content[2:]] == [LS, CAT]


def test_a_thinking_answer_that_is_told_again_is_not_computed_again(speaking: Callable[..., Gateway]) -> None:
    """The client drops the thought, so the session continues from the last common token."""
    gateway = speaking()
    first = message(gateway, ANSWER)
    calls = [one for one in first.content if one.type == "tool_use"]
    results = [{"type": "tool_result", "tool_use_id": one.id, "content": "etc"} for one in calls]
    history = [*user(ANSWER), {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    second = gateway.anthropic().messages.create(model="fake", messages=history, tools=ANTHROPIC_TOOLS, max_tokens=4)
    prompt = first.usage.input_tokens + first.usage.cache_read_input_tokens
    assert second.usage.cache_read_input_tokens >= prompt - 1


def test_a_prompt_that_opens_a_thought_is_known(speaking: Callable[..., Gateway]) -> None:
    """As templates of thinking models do: the answer begins inside."""
    gateway = speaking()
    prefilled = [*user("so</think>yes"), {"role": "assistant", "content": "<think>\n"}]
    reply = gateway.openai().chat.completions.create(
        model="fake", messages=prefilled, extra_body={"continue_final_message": True, "add_generation_prompt": False}
    )
    assert reply.choices[0].message.reasoning_content == "so" and reply.choices[0].message.content == "yes"


# -- forced calls


def test_without_structured_output_a_forced_call_is_refused_by_name(speaking: Callable[..., Gateway]) -> None:
    gateway = speaking()
    for refused in (
        lambda: chat(gateway, "x", tool_choice="required"),
        lambda: chat(gateway, "x", tool_choice={"type": "function", "function": {"name": "ls"}}),
        lambda: respond(gateway, "x", tool_choice={"type": "function", "name": "ls"}),
    ):
        with pytest.raises(openai.BadRequestError, match="fake cannot force a call") as error:
            refused()
        assert error.value.param == "tool_choice"
    for choice in ({"type": "any"}, {"type": "tool", "name": "ls"}):
        with pytest.raises(anthropic.BadRequestError, match=r"tool_choice.*cannot force a call"):
            message(gateway, "x", tool_choice=choice)


def test_forced_calls_are_json_that_is_read_as_calls(speaking: Callable[..., Gateway]) -> None:
    gateway = speaking(structured=True)
    both = json.dumps([{"name": "ls", "parameters": {"path": "/"}}, {"name": "cat", "parameters": {"path": "/etc"}}])
    named = '{"path": "/"}'
    reply = chat(gateway, both, tool_choice="required").choices[0]
    assert chat_calls(reply.message.tool_calls) == [LS, CAT] and reply.message.content is None
    assert json.loads(gateway.engine.schemas[-1])["minItems"] == 1  # type: ignore[attr-defined]
    reply = chat(gateway, named, tool_choice={"type": "function", "function": {"name": "ls"}}).choices[0]
    assert chat_calls(reply.message.tool_calls) == [LS]
    assert json.loads(gateway.engine.schemas[-1]) == FUNCTIONS[0]["parameters"]  # type: ignore[attr-defined]
    items = respond(gateway, both, tool_choice="required").output
    assert [(one.name, json.loads(one.arguments)) for one in items] == [LS, CAT]
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "ls"}]}
    assert respond(gateway, both, tool_choice=allowed).output[0].name == "ls"
    events = list(respond(gateway, named, tool_choice={"type": "function", "name": "ls"}, stream=True))
    assert [e.arguments for e in events if e.type == "response.function_call_arguments.done"] == [named]
    blocks = message(gateway, both, tool_choice={"type": "any"}).content
    assert [(one.name, one.input) for one in blocks] == [LS, CAT]
    blocks = message(gateway, named, tool_choice={"type": "tool", "name": "ls"}).content
    assert [(one.name, one.input) for one in blocks] == [LS]
    cut = chat(gateway, named, tool_choice="required", max_tokens=5).choices[0]
    assert cut.message.content == named[:5] and cut.finish_reason == "length"


def test_a_forced_call_names_a_tool_and_goes_with_no_format(speaking: Callable[..., Gateway]) -> None:
    gateway = speaking(structured=True)
    with pytest.raises(openai.BadRequestError, match="there is no tool 'rm'"):
        chat(gateway, "x", tool_choice={"type": "function", "function": {"name": "rm"}})
    with pytest.raises(openai.BadRequestError, match="structured output"):
        chat(gateway, "x", tool_choice="required", response_format={"type": "json_object"})
    with pytest.raises(openai.BadRequestError, match="allowed_tools"):
        respond(gateway, "x", tool_choice={"type": "allowed_tools", "mode": "auto", "tools": []})


def test_the_schema_of_a_forced_call(speaking: Callable[..., Gateway]) -> None:
    from thaw.gateway.dialects.choice import chosen
    from thaw.gateway.dialects.common import tools_of
    from thaw.gateway.problems import ApiError

    engine = speaking(structured=True).engine
    path = {"type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, "$defs": {"P": {"type": "string"}}}
    tools = tools_of([{"type": "function", "name": "a", "parameters": path}, {"type": "function", "name": "b"}])
    schema = chosen(tools, "required", engine, parallel=False).schema()
    assert schema is not None and schema["$defs"] == path["$defs"] and schema["maxItems"] == 1
    assert [one["properties"]["name"]["enum"] for one in schema["items"]["anyOf"]] == [["a"], ["b"]]
    assert "$defs" not in schema["items"]["anyOf"][0]["properties"]["parameters"]
    assert chosen(tools, {"type": "function", "name": "a"}, engine).schema() == path
    other = {"type": "function", "name": "c", "parameters": {**path, "$defs": {"P": {"type": "number"}}}}
    both = tools_of([{"type": "function", "name": "a", "parameters": path}, other])
    with pytest.raises(ApiError, match="'P'"):
        chosen(both, "required", engine).schema()


def test_one_call_at_a_time(speaking: Callable[..., Gateway]) -> None:
    """The answer ends behind its first call: what would follow is not generated."""
    gateway = speaking(step_s=0.003)
    endless = CALL + OTHER * 20
    reply = chat(gateway, endless, parallel_tool_calls=False)
    assert chat_calls(reply.choices[0].message.tool_calls) == [LS] and reply.choices[0].finish_reason == "tool_calls"
    assert reply.usage.completion_tokens < len(CALL + OTHER * 5)
    reply = respond(gateway, endless, parallel_tool_calls=False)
    assert [one.name for one in reply.output] == ["ls"] and reply.status == "completed"
    reply = message(gateway, endless, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [one.name for one in reply.content] == ["ls"] and reply.stop_reason == "tool_use"


# -- log probabilities and echo


def test_streams_have_the_likeliest_tokens_at_their_end(speaking: Callable[..., Gateway]) -> None:
    gateway = speaking()
    ask: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
    whole = chat(gateway, "hello", **ask).choices[0].logprobs.content
    told = []
    for chunk in chat(gateway, "hello", stream=True, **ask):
        told += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert told == whole and all(len(one.top_logprobs) == 2 for one in told)
    include: Any = ["message.output_text.logprobs"]
    events = list(respond(gateway, "hello", stream=True, top_logprobs=2, include=include))
    done = next(event for event in events if event.type == "response.output_text.done")
    shown = events[-1].response.output[0].content[0].logprobs
    assert [one.logprob for one in done.logprobs] == [one.logprob for one in shown] and len(shown) == 6
    assert all(len(one.top_logprobs) == 2 for one in shown)
    texts = gateway.openai().completions.create
    whole_text = texts(model="fake", prompt=say("hello"), logprobs=2).choices[0].logprobs
    chunks = list(texts(model="fake", prompt=say("hello"), logprobs=2, stream=True))
    assert chunks[-1].choices[0].logprobs == whole_text and len(whole_text.top_logprobs) == len(whole_text.tokens)


def test_echo_gives_the_prompt_before_the_completion(speaking: Callable[..., Gateway]) -> None:
    gateway = speaking()
    texts = gateway.openai().completions.create
    prompts = [say("one"), say("two")]
    reply = texts(model="fake", prompt=prompts, echo=True, n=2)
    expected = [prompts[0] + "one"] * 2 + [prompts[1] + "two"] * 2
    assert [choice.text for choice in reply.choices] == expected
    told = [""] * 4
    for chunk in texts(model="fake", prompt=prompts, echo=True, n=2, stream=True):
        told[chunk.choices[0].index] += chunk.choices[0].text
    assert told == expected
    with pytest.raises(openai.BadRequestError, match="echo"):
        texts(model="fake", prompt="x", echo=True, logprobs=1)
