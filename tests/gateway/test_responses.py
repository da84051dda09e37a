"""OpenAI's Responses through the stock client: every response is a point that can be continued from."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gateway_stand import Gateway, Start

openai = pytest.importorskip("openai")
LONG = "a long story about a river, and who lives there. " * 8


def test_a_response_is_answered_and_kept(gateway: Gateway) -> None:
    client = gateway.openai()
    made = client.responses.create(model="fake", input=LONG, max_output_tokens=8, metadata={"a": "b"})
    assert made.status == "incomplete" and made.incomplete_details.reason == "max_output_tokens"
    assert made.output_text and made.usage.output_tokens == 8
    again = client.responses.retrieve(made.id)
    assert again.model_dump() == made.model_dump()
    items = client.responses.input_items.list(made.id).data
    assert items[0].role == "user" and items[0].content[0].text == LONG
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_two_with_one_previous_response_are_two_children(gateway: Gateway) -> None:
    client = gateway.openai()
    first = client.responses.create(model="fake", input=LONG, max_output_tokens=8)
    before = gateway.num_forwarded
    two = [
        client.responses.create(model="fake", input="And then?", previous_response_id=first.id, max_output_tokens=8)
        for _ in range(2)
    ]
    assert [one.thaw["parent"] for one in two] == [first.thaw["point"]] * 2
    assert two[0].id != two[1].id and two[0].output_text != two[1].output_text
    for one in two:
        details = one.usage.input_tokens_details
        assert details.cached_tokens == first.usage.total_tokens - 1
        assert one.thaw["prefilled_tokens"] == one.usage.input_tokens - details.cached_tokens
    assert gateway.num_forwarded - before == sum(one.thaw["prefilled_tokens"] + 7 for one in two)


def test_a_stream_has_the_events_that_the_client_reads(gateway: Gateway) -> None:
    client = gateway.openai()
    events = list(client.responses.create(model="fake", input="hello", max_output_tokens=12, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"
    ]  # fmt: skip
    assert kinds[-1] == "response.incomplete"
    told = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert told == events[-1].response.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert client.responses.retrieve(events[0].response.id).output_text == told


def test_the_clients_own_accumulation_ends_with_what_is_stored(gateway: Gateway) -> None:
    client = gateway.openai()
    with client.responses.stream(model="fake", input="hello", extra_body={"stop": [" ", "e"]}) as stream:
        final = stream.until_done().get_final_response()
    assert final.status == "completed"
    assert client.responses.retrieve(final.id).output_text == final.output_text


def test_a_response_that_is_not_stored_is_not_found_and_still_a_point(gateway: Gateway) -> None:
    client = gateway.openai()
    made = client.responses.create(model="fake", input=LONG, max_output_tokens=8, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="fake", input="x", previous_response_id=made.id)
    on = client.responses.create(
        model="fake", input="x", max_output_tokens=4, extra_body={"thaw": {"point": made.thaw["point"]}}
    )
    assert on.thaw["parent"] == made.thaw["point"] and on.thaw["cached_tokens"] == made.usage.total_tokens - 1
    assert [ref.name for ref in gateway.repo.branches()] == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tool_calls", 3),
        ("truncation", "auto"),
        ("prompt", {"id": "x"}),
        ("nonsense", 1),
        ("context_management", [{"type": "compaction"}]),
    ],
)
def test_a_field_that_could_change_the_output_is_refused_by_name(gateway: Gateway, field: str, value: object) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        gateway.openai().responses.create(model="fake", input="x", extra_body={field: value})
    assert refused.value.param == field and refused.value.code == "unsupported_parameter"


def test_a_field_that_cannot_is_named_in_a_header(gateway: Gateway) -> None:
    raw = gateway.openai().responses.with_raw_response.create(
        model="fake", input="x", max_output_tokens=2, user="me", prompt_cache_key="k"
    )
    assert raw.headers["x-thaw-ignored"] == "prompt_cache_key,user"
    assert raw.headers["x-thaw-point"] == raw.parse().thaw["point"]


def test_a_fork_at_a_token_and_a_name_for_the_end(gateway: Gateway) -> None:
    client = gateway.openai()
    first = client.responses.create(model="fake", input=LONG, max_output_tokens=20)
    at = first.usage.input_tokens + 5
    kid = client.responses.create(
        model="fake", input="Go on.", previous_response_id=first.id, max_output_tokens=4,
        extra_body={"thaw": {"turn": 2, "branch": "main", "note": "my note"}},
    )  # fmt: skip
    entry = gateway.repo.log("main")[0]
    assert str(entry.commit) == kid.thaw["point"] and entry.message == "my note"
    cut = client.responses.create(
        model="fake", input="Go on.", previous_response_id=first.id, max_output_tokens=4,
        extra_body={"thaw": {"token": at}},
    )  # fmt: skip
    assert cut.thaw["cached_tokens"] in (at, at - 1)


def test_new_instructions_read_all_again_and_say_so(gateway: Gateway) -> None:
    client = gateway.openai()
    first = client.responses.create(model="fake", input=LONG, max_output_tokens=8, instructions="Be brief.")
    same = client.responses.create(
        model="fake", input="x", previous_response_id=first.id, max_output_tokens=4, instructions="Be brief."
    )
    assert same.usage.input_tokens_details.cached_tokens == first.usage.total_tokens - 1
    other = client.responses.create(
        model="fake", input="x", previous_response_id=first.id, max_output_tokens=4, instructions="Sing."
    )
    assert other.usage.input_tokens_details.cached_tokens < 16
    without = client.responses.create(model="fake", input="x", previous_response_id=first.id, max_output_tokens=4)
    assert without.usage.input_tokens_details.cached_tokens < 16
    told = gateway.repo.session(without.thaw["point"]).messages
    assert [message["role"] for message in told] == ["user", "assistant", "user", "assistant"]


def test_after_a_restart_it_goes_on_from_what_is_stored(start: Start) -> None:
    gateway = start()
    first = gateway.openai().responses.create(model="fake", input=LONG, max_output_tokens=8)
    gateway.close()
    again = start()
    before = again.num_forwarded
    kid = again.openai().responses.create(
        model="fake", input="Go on.", previous_response_id=first.id, max_output_tokens=4
    )
    assert kid.usage.input_tokens_details.cached_tokens == first.usage.total_tokens - 1
    assert again.num_forwarded - before == kid.thaw["prefilled_tokens"] + 3


def test_a_conversation_is_continued_by_one_from_when_it_is_read(gateway: Gateway) -> None:
    """Whoever comes between a response's look at the conversation and its beginning is refused. Otherwise the first one
    would answer behind a place where the conversation stands no more."""
    client, asked, let = gateway.openai(), threading.Event(), threading.Event()
    conversation = client.conversations.create().id
    look = gateway.service.point

    async def slow(*named: Any, **more: Any) -> Any:
        found = await look(*named, **more)
        asked.set()
        await asyncio.to_thread(let.wait, 20)
        return found

    def ask(text: str) -> Any:
        return client.responses.create(model="fake", input=text, conversation=conversation, max_output_tokens=4)

    before = ask("First.")
    gateway.service.point = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, "Second.")
        assert asked.wait(20)
        try:
            for do in (lambda: ask("Third."), lambda: client.conversations.delete(conversation)):
                with pytest.raises(openai.ConflictError, match="already continuing"):
                    do()
        finally:
            let.set()
        assert first.result().thaw["parent"] == before.thaw["point"]
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="fake", input="x", conversation=conversation, temperature=-1)
    assert ask("Third.").thaw["parent"] == first.result().thaw["point"]
