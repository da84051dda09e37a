"""Anthropic's Messages through the stock client."""

from __future__ import annotations

from typing import Any

import pytest

from gateway_stand import Gateway

anthropic = pytest.importorskip("anthropic")
LONG = "a long story about a river, and who lives there. " * 8


def ask(client: Any, messages: list[dict[str, Any]], **more: Any) -> Any:
    return client.messages.create(model="fake", messages=messages, **{"max_tokens": 8, **more})


def all_input(usage: Any) -> int:
    return int(usage.input_tokens + usage.cache_read_input_tokens)


def test_input_tokens_leave_out_what_was_cached(gateway: Gateway) -> None:
    client = gateway.anthropic()
    history: list[dict[str, Any]] = [{"role": "user", "content": LONG}]
    first = ask(client, history, system="Be brief.")
    assert first.usage.cache_read_input_tokens == 0 and first.stop_reason == "max_tokens"
    history += [{"role": "assistant", "content": first.content[0].text}, {"role": "user", "content": "Go on."}]
    second = ask(client, history, system="Be brief.")
    assert second.usage.cache_read_input_tokens == all_input(first.usage) + 8 - 1
    assert second.usage.input_tokens < 40


def test_tokens_are_counted_as_they_are_read(gateway: Gateway) -> None:
    client = gateway.anthropic()
    ask_it: dict[str, Any] = {"system": "Be brief.", "messages": [{"role": "user", "content": LONG}]}
    counted = client.messages.count_tokens(model="fake", **ask_it).input_tokens
    reply = client.messages.create(model="fake", max_tokens=2, **ask_it)
    assert counted == all_input(reply.usage)


def test_a_stream_is_what_the_client_accumulates(gateway: Gateway) -> None:
    client = gateway.anthropic()
    with client.messages.stream(
        model="fake", max_tokens=300, messages=[{"role": "user", "content": "hello"}], stop_sequences=["e"]
    ) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert final.content[0].text == text and final.stop_reason == "stop_sequence" and final.stop_sequence == "e"
    assert final.usage.output_tokens > len(text) - 1


def test_a_billing_line_and_rolling_marks_change_no_prefix(gateway: Gateway) -> None:
    client = gateway.anthropic()

    def system(number: int) -> list[dict[str, Any]]:
        billing = {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.36; cch={number:05x};"}
        return [billing, {"type": "text", "text": LONG, "cache_control": {"type": "ephemeral"}}]

    tools = [{"name": name, "description": LONG, "input_schema": {"type": "object"}} for name in ("read", "edit")]
    mark = {"cache_control": {"type": "ephemeral"}}
    first = ask(
        client,
        [{"role": "user", "content": [{"type": "text", "text": LONG, **mark}]}],
        system=system(1),
        tools=[tools[0], {**tools[1], **mark}],
    )
    history = [
        {"role": "user", "content": [{"type": "text", "text": LONG}]},
        {"role": "assistant", "content": [{"type": "text", "text": first.content[0].text}]},
        {"role": "user", "content": [{"type": "text", "text": "Go on.", **mark}]},
    ]
    second = ask(client, history, system=system(2), tools=[{**tools[1], **mark}, tools[0]])
    assert second.usage.cache_read_input_tokens == all_input(first.usage) + 8 - 1


def test_calls_and_results_of_tools_are_read(gateway: Gateway) -> None:
    client = gateway.anthropic()
    history = [
        {"role": "user", "content": "List the files."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "ls", "input": {"path": "/"}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "etc usr"}]},
    ]
    reply = ask(client, history, tools=[{"name": "ls", "input_schema": {"type": "object"}}])
    told = gateway.repo.session(reply.thaw["point"]).messages
    assert [message["role"] for message in told] == ["user", "assistant", "tool", "assistant"]
    assert told[1]["tool_calls"][0]["function"]["name"] == "ls"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"extra_body": {"container": "c"}}, "container"),
        ({"extra_body": {"thinking": {"type": "enabled", "a\r\nb: c": 1}}}, "thinking.a"),
        ({"extra_body": {"temperature": -1.0}}, "temperature"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(gateway: Gateway, more: dict[str, Any], named: str) -> None:
    messages = more.pop("messages", [{"role": "user", "content": "x"}])
    with pytest.raises(anthropic.BadRequestError) as refused:
        ask(gateway.anthropic(), messages, **more)
    assert refused.value.body["error"]["message"].startswith(named)


def test_errors_are_those_that_the_client_knows(gateway: Gateway) -> None:
    with pytest.raises(anthropic.AuthenticationError):
        ask(gateway.anthropic("wrong"), [{"role": "user", "content": "x"}])
    with pytest.raises(anthropic.NotFoundError):
        gateway.anthropic().messages.create(model="claude", max_tokens=1, messages=[{"role": "user", "content": "x"}])
    for refused in (gateway.anthropic("wrong").models.list, lambda: gateway.anthropic().models.retrieve("x")):
        with pytest.raises(anthropic.APIStatusError) as found:
            refused()
        assert found.value.body["type"] == "error" and found.value.type in ("authentication_error", "not_found_error")


def test_an_answer_goes_on_from_its_beginning(gateway: Gateway) -> None:
    reply = ask(gateway.anthropic(), [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Well"}])
    told = gateway.repo.session(reply.thaw["point"]).messages
    assert told[-1]["content"] == "Well" + reply.content[0].text


def test_thinking_is_a_variable_of_the_template(gateway: Gateway) -> None:
    client = gateway.anthropic()
    raw = client.messages.with_raw_response.create(
        model="fake", max_tokens=2, messages=[{"role": "user", "content": "x"}],
        extra_body={"thinking": {"type": "enabled", "budget_tokens": 2000}},
    )  # fmt: skip
    assert raw.headers["x-thaw-ignored"] == "thinking.budget_tokens"
    text = gateway.repo.session(raw.parse().thaw["point"]).text
    assert '"enable_thinking": true' in text
