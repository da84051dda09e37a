"""Requests that come at once: a prefix is loaded and read once; clients that go away; streams by the hundred."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import thaw
from gateway_stand import TOKEN, Gateway, Start
from thaw.gateway import reply
from thaw.gateway.place import WORTH_LOADING

openai = pytest.importorskip("openai")
LONG = "a long story about a river, and who lives there. " * 40


def chat(client: Any, messages: list[dict[str, Any]], **more: Any) -> Any:
    return client.chat.completions.create(model="fake", messages=messages, **{"max_tokens": 8, **more})


def at_once(n: int, do: Any) -> list[Any]:
    barrier = threading.Barrier(n)

    def one(i: int) -> Any:
        barrier.wait()
        return do(i)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(one, range(n)))


def test_a_prefix_at_first_sight_is_read_once(start: Start) -> None:
    gateway = start(step_s=0.002)
    client = gateway.openai()
    before = gateway.num_forwarded
    prompts = [[{"role": "system", "content": LONG}, {"role": "user", "content": f"Question {i}"}] for i in range(8)]
    replies = at_once(8, lambda i: chat(client, prompts[i]))
    read = gateway.num_forwarded - before - 8 * 7
    shared = len(LONG)
    assert read < shared + 8 * 60, (read, shared)
    assert sorted(reply.usage.prompt_tokens_details.cached_tokens > shared for reply in replies) == [False] + [True] * 7


def test_a_part_of_a_stored_text_is_loaded_where_it_saves_enough_and_the_end_of_one_always(start: Start) -> None:
    """By the engine's count."""
    begun, short = tuple(range(60, 120)), (60, 1, 2)

    def ask(gateway: Gateway, *tokens: int) -> Any:
        return gateway.openai().completions.create(
            model="fake", prompt=list(tokens), max_tokens=2, extra_body={"ignore_eos": True}
        )

    def told(reply: Any) -> tuple[str, int]:
        return reply.thaw["source"], reply.thaw["cached_tokens"]

    gateway = start()
    ask(gateway, *begun)
    with gateway.repo.session(ask(gateway, *short).thaw["point"]) as said:
        whole = said.tokens
    gateway.close()
    again = start()
    assert told(ask(again, *begun[:5], 9)) == ("stored", 4)  # nothing is open
    almost = 5 + WORTH_LOADING - 1
    assert told(ask(again, *begun[:almost], 8)) == ("live", 4)
    enough = almost + WORTH_LOADING
    assert told(ask(again, *begun[:enough], 7)) == ("stored", enough - 1)
    on = ask(again, *whole, 5)
    assert told(on) == ("stored", len(whole) - 1) and len(whole) < WORTH_LOADING
    assert on.thaw["parent"] is not None


def test_a_stored_prefix_is_loaded_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = start()
    first = gateway.openai().responses.create(model="fake", input=LONG, max_output_tokens=8)
    gateway.close()
    again = start(step_s=0.002)
    loads = []
    hydrate = again.engine.hydrate
    monkeypatch.setattr(again.engine, "hydrate", lambda plan: (loads.append(plan.num_kv), hydrate(plan))[1])
    client = again.openai()
    replies = at_once(
        8,
        lambda i: client.responses.create(
            model="fake", input=f"Go on {i}.", previous_response_id=first.id, max_output_tokens=8
        ),
    )
    assert len(loads) == 1
    assert {reply.thaw["parent"] for reply in replies} == {first.thaw["point"]}
    assert all(reply.thaw["cached_tokens"] == first.usage.total_tokens - 1 for reply in replies)


def test_who_waits_goes_on_when_the_first_one_fails(start: Start) -> None:
    """The first one is stopped half way through its prompt, while another one waits for it."""
    gateway = start(step_s=0.3)
    client = gateway.openai()
    messages = [{"role": "user", "content": LONG * 2}]
    stream = chat(client, messages, stream=True, max_tokens=300)
    replies: list[Any] = []
    follower = threading.Thread(target=lambda: replies.append(chat(client, messages, max_tokens=2)))
    follower.start()
    while len(gateway.service.live) < 2:
        time.sleep(0.005)
    stream.close()
    follower.join(60)
    assert replies and replies[0].usage.completion_tokens == 2
    assert replies[0].usage.prompt_tokens_details.cached_tokens < replies[0].usage.prompt_tokens - 1


def quiet(gateway: Gateway) -> None:
    for _ in range(500):
        if gateway.service.num_running == 0:
            return
        time.sleep(0.02)
    raise AssertionError("still running")


def test_a_client_that_goes_away_ends_its_response_and_keeps_what_was_said(start: Start) -> None:
    gateway = start(step_s=0.005)
    client = gateway.openai()
    stream = client.responses.create(model="fake", input=LONG, max_output_tokens=3000, stream=True)
    seen = [event for _, event in zip(range(12), stream, strict=False)]
    stream.close()
    quiet(gateway)
    kept = client.responses.retrieve(seen[0].response.id)
    assert kept.status == "incomplete" and kept.thaw["point"]
    told = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
    assert kept.output_text.startswith(told) and kept.usage.output_tokens < 3000
    on = client.responses.create(model="fake", input="x", previous_response_id=kept.id, max_output_tokens=2)
    assert on.thaw["parent"] == kept.thaw["point"]
    assert on.thaw["cached_tokens"] >= kept.usage.input_tokens


def test_a_client_that_goes_away_from_a_whole_reply_stops_it(start: Start) -> None:
    gateway = start(step_s=0.005)
    body = json.dumps({"messages": [{"role": "user", "content": LONG}], "max_tokens": 5000})
    before = gateway.num_forwarded
    with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        while gateway.num_forwarded - before < len(LONG) + 40:
            time.sleep(0.005)
    quiet(gateway)
    assert gateway.num_forwarded - before < 4000
    retry = chat(gateway.openai(), [{"role": "user", "content": LONG}])
    assert retry.usage.prompt_tokens_details.cached_tokens == retry.usage.prompt_tokens - 1


def test_one_conversation_has_one_response_at_a_time(start: Start) -> None:
    gateway = start(step_s=0.005)
    client = gateway.openai()
    conversation = client.conversations.create(
        items=[{"role": "user", "content": "My name is Ada."}], metadata={"of": "ada"}
    )
    ask: dict[str, Any] = {"model": "fake", "conversation": conversation.id, "max_output_tokens": 8}
    first = client.responses.create(input="Who am I?", **ask)
    second = client.responses.create(input="And you?", **ask)
    assert second.thaw["parent"] == first.thaw["point"]
    assert second.thaw["cached_tokens"] == first.usage.total_tokens - 1
    listed = client.conversations.items.list(conversation.id, order="asc").data
    assert [item.role for item in listed] == ["user", "user", "assistant", "user", "assistant"]
    stream = client.responses.create(input="On?", stream=True, **{**ask, "max_output_tokens": 500})
    next(iter(stream))
    with pytest.raises(openai.ConflictError):
        client.responses.create(input="x", **ask)
    stream.close()
    quiet(gateway)
    assert client.conversations.update(conversation.id, metadata={"of": "bob"}).metadata == {"of": "bob"}
    client.conversations.delete(conversation.id)
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(conversation.id)
    assert gateway.repo.branches() == []


def test_a_response_in_the_background_is_followed_from_any_event(start: Start) -> None:
    gateway = start(step_s=0.003)
    client = gateway.openai()
    made = client.responses.create(model="fake", input=LONG, max_output_tokens=60, background=True)
    assert made.status == "queued"
    live = list(client.responses.retrieve(made.id, stream=True))
    assert [event.sequence_number for event in live] == list(range(len(live)))
    assert live[0].type == "response.queued" and live[-1].type == "response.incomplete"
    done = client.responses.retrieve(made.id)
    assert done.status == "incomplete" and done.usage.output_tokens == 60
    for after in (0, 5, 20, len(live) - 2):
        again = list(client.responses.retrieve(made.id, stream=True, starting_after=after))
        assert [(e.sequence_number, e.type) for e in again] == [(e.sequence_number, e.type) for e in live[after + 1 :]]
        assert [getattr(e, "delta", None) for e in again] == [getattr(e, "delta", None) for e in live[after + 1 :]]


def test_a_stream_is_told_again_after_a_restart(start: Start) -> None:
    gateway = start()
    events = list(gateway.openai().responses.create(model="fake", input="hi", max_output_tokens=40, stream=True))
    gateway.close()
    again = start().openai().responses.retrieve(events[0].response.id, stream=True, starting_after=10)
    assert [(e.sequence_number, getattr(e, "delta", None)) for e in again] == [
        (e.sequence_number, getattr(e, "delta", None)) for e in events[11:]
    ]


def test_a_response_in_the_background_is_cancelled(start: Start) -> None:
    gateway = start(step_s=0.005)
    client = gateway.openai()
    made = client.responses.create(model="fake", input=LONG, max_output_tokens=5000, background=True)
    following = iter(client.responses.retrieve(made.id, stream=True))
    while next(following).type != "response.output_text.delta":
        pass
    ended = client.responses.cancel(made.id)
    assert ended.status == "cancelled" and 0 < ended.usage.output_tokens < 5000
    assert client.responses.cancel(made.id).status == "cancelled"
    front = client.responses.create(model="fake", input="x", max_output_tokens=2)
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(front.id)


@pytest.mark.slow("500 streams at once")
def test_500_streams_lose_and_double_nothing(start: Start) -> None:
    gateway = start(step_s=0.001)
    num, length = 500, 12

    async def one(client: httpx.AsyncClient, i: int) -> bool:
        body = {"input": f"stream {i}", "max_output_tokens": length, "stream": True, "seed": i}
        told, number, final = "", 0, None
        async with client.stream("POST", "/v1/responses", json=body) as reply:
            async for line in reply.aiter_lines():
                if not line.startswith("data: "):
                    continue
                event = json.loads(line[6:])
                assert event["sequence_number"] == number
                number += 1
                told += event.get("delta", "")
                final = event.get("response", final)
        assert final is not None
        assert final["output"][0]["content"][0]["text"] == told and final["usage"]["output_tokens"] == length
        return True

    async def all_of() -> list[bool]:
        limits = httpx.Limits(max_connections=num)
        headers = {"authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(base_url=gateway.url, headers=headers, limits=limits, timeout=300) as client:
            return await asyncio.gather(*(one(client, i) for i in range(num)))

    assert all(asyncio.run(all_of()))
    most = gateway.service.settings.limits.live_sessions
    assert gateway.num_open(most) <= most and len(gateway.service.live) <= most
    assert threading.active_count() < 200


def test_streams_pause_while_the_engine_is_started_anew_and_go_on(start: Start) -> None:
    """What was said goes on to the letter, with the seed it had; and what was acknowledged before is still there."""
    gateway = start(step_s=0.005, reconnect=lambda: thaw.load_engine("fake", step_s=0.005))
    client = gateway.openai()
    first = client.responses.create(model="fake", input=LONG, max_output_tokens=8)
    ask: dict[str, Any] = {
        "model": "fake", "input": "Go on.", "max_output_tokens": 80, "extra_body": {"seed": 3},
        "previous_response_id": first.id,
    }  # fmt: skip
    events = []
    for event in client.responses.create(stream=True, **ask):
        events.append(event)
        if len(events) == 30:
            gateway.engine.close()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    told = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    done = events[-1].response
    assert done.output_text == told and done.usage.output_tokens == 80
    assert client.responses.create(**ask).output_text == told
    assert client.responses.retrieve(first.id).output_text == first.output_text


def test_without_another_engine_it_is_503(start: Start) -> None:
    gateway = start()
    gateway.engine.close()
    with pytest.raises(openai.InternalServerError) as refused:
        chat(gateway.openai(), [{"role": "user", "content": "x"}])
    assert refused.value.status_code == 503 and refused.value.response.headers["retry-after"]


def test_a_silent_stream_says_that_it_is_still_there(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """In comments, which clients leave out."""
    monkeypatch.setattr(reply, "PAUSE_S", 0.05)
    gateway = start(step_s=0.2)
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": True}
    headers = {"authorization": f"Bearer {TOKEN}"}
    text = httpx.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers, timeout=30).text
    assert ": still here" in text and text.rstrip().endswith("[DONE]")
    stream = chat(gateway.openai(), body["messages"], stream=True, max_tokens=3)  # type: ignore[arg-type]
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
