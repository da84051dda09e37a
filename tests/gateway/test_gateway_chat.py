"""Chat Completions and Completions through the stock client: the tokens say where to continue from."""

from __future__ import annotations

from typing import Any

import pytest

from gateway_stand import Gateway, Start

openai = pytest.importorskip("openai")

from thaw.gateway.place import WORTH_LOADING  # noqa: E402

LONG = "a long story about a river, and who lives there. " * 8


def chat(client: Any, messages: list[dict[str, Any]], **more: Any) -> Any:
    return client.chat.completions.create(model="fake", messages=messages, **{"max_tokens": 8, **more})


def said(reply: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": reply.choices[0].message.content}


def test_the_next_turn_reads_only_what_is_new(gateway: Gateway) -> None:
    client = gateway.openai()
    history: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
    known = 0
    for turn in range(6):
        history.append({"role": "user", "content": f"{LONG} {turn}"})
        before = gateway.num_forwarded
        reply = chat(client, history)
        assert reply.usage.prompt_tokens_details.cached_tokens == known
        assert gateway.num_forwarded - before == reply.usage.prompt_tokens - known + 7
        known = reply.usage.total_tokens - 1
        history.append(said(reply))


def test_a_fork_from_any_earlier_turn_reads_only_what_is_new(gateway: Gateway) -> None:
    client = gateway.openai()
    history: list[dict[str, Any]] = []
    ends = []
    for turn in range(5):
        history.append({"role": "user", "content": f"{LONG} {turn}"})
        reply = chat(client, history)
        history.append(said(reply))
        ends.append((len(history), reply.usage.total_tokens))
    for length, total in reversed(ends):
        reply = chat(client, [*history[:length], {"role": "user", "content": "Something else."}])
        assert reply.usage.prompt_tokens_details.cached_tokens >= total - 1


def test_the_same_after_a_restart(start: Start) -> None:
    gateway = start()
    history: list[dict[str, Any]] = [{"role": "user", "content": LONG}]
    first = chat(gateway.openai(), history)
    gateway.close()
    again = start()
    history += [said(first), {"role": "user", "content": "Go on."}]
    before = again.num_forwarded
    reply = chat(again.openai(), history)
    assert reply.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens - 1
    assert reply.thaw["source"] == "stored"
    assert (
        again.num_forwarded - before == reply.usage.prompt_tokens - reply.usage.prompt_tokens_details.cached_tokens + 7
    )


@pytest.mark.parametrize(("shared", "source"), [(WORTH_LOADING - 1, "live"), (WORTH_LOADING, "stored")])
def test_a_few_tokens_alike_by_chance_are_not_worth_a_load(start: Start, shared: int, source: str) -> None:
    """`shared`: how many more than an open session has are stored. The end of a commit is loaded for fewer."""
    gateway = start()
    stored = chat(gateway.openai(), [{"role": "user", "content": LONG}])
    gateway.close()
    client = start().openai()
    assert chat(client, [{"role": "user", "content": "?"}]).thaw["source"] == "new"
    reply = chat(client, [{"role": "user", "content": f"{LONG[:shared]}#"}])
    assert reply.thaw["source"] == source
    on = chat(client, [{"role": "user", "content": LONG}, said(stored), {"role": "user", "content": "On."}])
    assert on.thaw["source"] == "stored" and on.thaw["cached_tokens"] == stored.usage.total_tokens - 1


def test_a_stored_text_does_not_hide_an_open_conversation(start: Start) -> None:
    """A conversation does not go on behind a plain text, however long their tokens are the same; it is not loaded."""
    longer = f"{LONG}and here both of them go on together"
    gateway = start(name="tokens")
    told = chat(gateway.openai(), [{"role": "user", "content": longer}])
    prompt = list(gateway.repo.show(told.thaw["point"]).tokens)[: told.usage.prompt_tokens]
    gateway = start()
    client = gateway.openai()
    text = client.completions.create(model="fake", prompt=prompt, max_tokens=8)
    opened = chat(client, [{"role": "user", "content": LONG}])
    assert (text.thaw["source"], opened.thaw["source"]) == ("new", "new")
    held = gateway.num_open(2)
    reply = chat(client, [{"role": "user", "content": f"{longer}!"}])
    assert reply.thaw["source"] == "live" and reply.thaw["cached_tokens"] > len(LONG)
    assert gateway.num_open(held + 1) == held + 1
    again = client.completions.create(model="fake", prompt=prompt, max_tokens=8)
    assert again.thaw["cached_tokens"] == len(prompt) - 1


def test_choices_differ_are_seeded_and_are_read_once(gateway: Gateway) -> None:
    client = gateway.openai()
    before = gateway.num_forwarded
    reply = chat(client, [{"role": "user", "content": LONG}], n=4, seed=7)
    texts = [choice.message.content for choice in reply.choices]
    assert len(set(texts)) == 4 and len(reply.thaw["points"]) == 4
    read = gateway.num_forwarded - before - 4 * 7
    assert reply.usage.prompt_tokens <= read <= reply.usage.prompt_tokens + 3
    again = chat(client, [{"role": "user", "content": LONG}], n=4, seed=7)
    assert [choice.message.content for choice in again.choices] == texts


def test_a_stream_says_what_the_whole_says(gateway: Gateway) -> None:
    client = gateway.openai()
    ask: dict[str, Any] = {"seed": 3, "n": 2, "logprobs": True}
    whole = chat(client, [{"role": "user", "content": "hello"}], **ask)
    texts, ends, logprobs, usage = ["", ""], ["", ""], [[], []], None
    stream = chat(
        client, [{"role": "user", "content": "hello"}], stream=True, stream_options={"include_usage": True}, **ask
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] += choice.finish_reason or ""
            logprobs[choice.index] += [] if choice.logprobs is None else choice.logprobs.content
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == ["length", "length"]
    assert usage.completion_tokens == 16 == whole.usage.completion_tokens
    for got, choice in zip(logprobs, whole.choices, strict=True):
        assert [one.logprob for one in got] == [one.logprob for one in choice.logprobs.content]


def test_log_probabilities_of_the_likeliest(gateway: Gateway) -> None:
    reply = chat(gateway.openai(), [{"role": "user", "content": "hello"}], logprobs=True, top_logprobs=3, temperature=0)
    content = reply.choices[0].logprobs.content
    assert len(content) == 8
    for one in content:
        assert len(one.top_logprobs) == 3 and one.top_logprobs[0].logprob == one.logprob


def test_stop_ends_and_is_cut(gateway: Gateway) -> None:
    client = gateway.openai()
    text = chat(client, [{"role": "user", "content": "hello"}], max_tokens=40, seed=1).choices[0].message.content
    stop = text[10:12]
    reply = chat(client, [{"role": "user", "content": "hello"}], max_tokens=40, seed=1, stop=[stop])
    assert reply.choices[0].message.content == text[: text.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_the_best_of_several(gateway: Gateway) -> None:
    client = gateway.openai()
    all_of = chat(client, [{"role": "user", "content": "hi"}], n=4, seed=5, logprobs=True)
    means = [sum(one.logprob for one in choice.logprobs.content) for choice in all_of.choices]
    best = chat(client, [{"role": "user", "content": "hi"}], seed=5, extra_body={"best_of": 4})
    assert best.choices[0].message.content == all_of.choices[means.index(max(means))].message.content
    assert len(best.choices) == 1


def test_tools_in_another_order_are_the_same_prefix(gateway: Gateway) -> None:
    client = gateway.openai()
    tools = [
        {"type": "function", "function": {"name": name, "description": LONG, "parameters": {"type": "object"}}}
        for name in ("read", "grep", "edit")
    ]
    first = chat(client, [{"role": "user", "content": LONG}], tools=tools)
    history = [{"role": "user", "content": LONG}, said(first), {"role": "user", "content": "x"}]
    second = chat(client, history, tools=tools[::-1])
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens - 1


def test_parts_and_strings_are_one_conversation(gateway: Gateway) -> None:
    client = gateway.openai()
    first = chat(client, [{"role": "user", "content": LONG}])
    parts = [{"type": "text", "text": LONG}]
    history = [{"role": "user", "content": parts}, {**said(first), "refusal": None}, {"role": "user", "content": "x"}]
    second = chat(client, history)
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens - 1


def test_completions_go_on_from_their_own_tokens(gateway: Gateway) -> None:
    client = gateway.openai()
    first = client.completions.create(model="fake", prompt=LONG, max_tokens=8, logprobs=2, seed=1)
    assert len(first.choices[0].logprobs.tokens) == 8
    second = client.completions.create(model="fake", prompt=LONG + first.choices[0].text + " more", max_tokens=4)
    assert second.usage.prompt_tokens_details.cached_tokens >= len(LONG)
    several = client.completions.create(model="fake", prompt=["one", "two"], max_tokens=3, n=2, seed=1)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3] and several.usage.completion_tokens == 12
    ids = client.completions.create(model="fake", prompt=[104, 105], max_tokens=3, seed=1)
    assert (
        ids.choices[0].text
        == client.completions.create(model="fake", prompt="hi", max_tokens=3, seed=1).choices[0].text
    )
    text = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(model="fake", prompt="hi", max_tokens=3, seed=1, stream=True)
    )
    assert text == ids.choices[0].text


def test_chat_behind_a_completion_of_the_same_text_is_a_chat(gateway: Gateway) -> None:
    """A completion whose prompt is a rendered conversation holds no messages, and no chat is appended to it."""
    client = gateway.openai()
    codec = gateway.engine.codec
    ids = codec.render_chat([{"role": "user", "content": LONG}], add_generation_prompt=True)
    client.completions.create(model="fake", prompt=ids, max_tokens=4)
    reply = chat(client, [{"role": "user", "content": LONG}])
    assert reply.usage.prompt_tokens == len(ids)
    assert [m["role"] for m in gateway.repo.session(reply.thaw["point"]).messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": 9e9}, "temperature"),
        ({"logit_bias": {"7": 1000}}, "logit_bias"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 0}, "n"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"extra_body": {"audio": {"voice": "x"}}}, "audio"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(gateway: Gateway, more: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(gateway.openai(), [{"role": "user", "content": "x"}], **more)
    assert refused.value.param == param, str(refused.value)


def test_too_many_choices_are_refused_before_anything_is_made_of_them(gateway: Gateway) -> None:
    client, many = gateway.openai(), 1_000_000
    create, hello = client.completions.create, [{"role": "user", "content": "hello"}]
    for ask in (
        lambda: chat(client, hello, n=many),
        lambda: chat(client, hello, n=1, extra_body={"best_of": many}),
        lambda: create(model="fake", prompt="hello", n=many),
        lambda: create(model="fake", prompt=["hello"] * 65),
    ):
        with pytest.raises(openai.BadRequestError, match="at most 64"):
            ask()


def test_too_long_a_prompt_and_an_unknown_model(start: Start) -> None:
    client = start(max_model_len=200).openai()
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, [{"role": "user", "content": LONG}])
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "x"}])
    assert unknown.value.code == "model_not_found"
    assert [model.id for model in client.models.list()] == ["fake"]


def test_history_has_the_shape_of_the_conversations(gateway: Gateway) -> None:
    """A turn follows the turn before it; a retry stands beside the first try; what shares no turn follows nothing."""
    client = gateway.openai()
    first = [{"role": "user", "content": LONG}]
    one = chat(client, first)
    on = [*first, said(one), {"role": "user", "content": "And then?"}]
    two, retry = chat(client, on), chat(client, on)
    other = chat(client, [{"role": "user", "content": f"{LONG} But why?"}])
    assert (two.thaw["parent"], retry.thaw["parent"]) == (one.thaw["point"], one.thaw["point"])
    assert other.thaw["parent"] is None and other.thaw["cached_tokens"] >= len(LONG)
    assert gateway.repo.log(retry.thaw["point"])[1].commit == one.thaw["point"]


def test_an_answer_that_is_told_in_other_tokens_keeps_those_that_were_sampled(start: Start) -> None:
    """A byte that is no text comes back as U+FFFD, three bytes; the session keeps the one, open or stored."""
    gateway = start()
    odd = {"logit_bias": {"200": 100}}
    history: list[dict[str, Any]] = [{"role": "user", "content": LONG}]
    for turn in range(3):
        reply = chat(gateway.openai(), history, **odd)
        assert "\ufffd" in reply.choices[0].message.content
        history += [said(reply), {"role": "user", "content": f"On {turn}."}]
        on = chat(gateway.openai(), history)
        assert on.usage.prompt_tokens_details.cached_tokens >= reply.usage.total_tokens - 2
        assert on.thaw["parent"] == reply.thaw["point"]
    gateway.close()
    last = chat(start().openai(), history)
    assert last.usage.prompt_tokens_details.cached_tokens >= reply.usage.total_tokens - 2
    assert last.thaw["source"] == "stored"


@pytest.mark.parametrize(
    ("name", "status"), [("no name", 400), ("there", 409), ("a-tag", 400), ("HEAD", 400), ("x" * 200, 400)]
)
def test_a_branch_that_cannot_be_moved_is_refused_before_anything_is_computed(
    gateway: Gateway, name: str, status: int
) -> None:
    """Also as one of several choices' (`NAME/0`), where the name is too long for that."""
    client = gateway.openai()
    there = chat(client, [{"role": "user", "content": LONG}], extra_body={"thaw": {"branch": "there"}})
    gateway.repo.tag("a-tag", "there")
    before = gateway.num_forwarded
    many = 2 if len(name) == 200 else 1
    with pytest.raises(openai.APIStatusError) as refused:
        chat(client, [{"role": "user", "content": "Else."}], n=many, extra_body={"thaw": {"branch": name}})
    assert refused.value.status_code == status and gateway.num_forwarded == before
    on = {"thaw": {"branch": "there", "point": "there"}}
    assert chat(client, [{"role": "user", "content": "On."}], extra_body=on).thaw["parent"] == there.thaw["point"]
