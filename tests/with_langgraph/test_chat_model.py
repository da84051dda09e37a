"""`ChatThaw` over an engine, a pool and a gateway: streams, several answers, tools, what is refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langgraph.graph import END, START, MessagesState, StateGraph
from pydantic import BaseModel

import thaw
from langgraph_stand import LONG, SAMPLING, THREAD, record
from thaw.core.errors import BadSampling, InvalidRequest, Unsupported
from thaw.integrations.langgraph import ChatThaw, best_of_n, point_of

ASKED: list[BaseMessage] = [SystemMessage("Be brief."), HumanMessage(LONG)]


def merged(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    return whole


def test_a_stream_says_what_a_call_says_and_ends_with_the_point(place: Any) -> None:
    model = place.model()

    async def streamed() -> list[Any]:
        return [chunk async for chunk in model.astream(ASKED, seed=5)]

    called = model.invoke(ASKED, seed=5)
    for chunks in (list(model.stream(ASKED, seed=5)), asyncio.run(streamed())):
        whole = merged(chunks)
        assert len(chunks) > 5 and whole.content == called.content
        assert place.repo.show(point_of(whole)).tokens == place.repo.show(point_of(called)).tokens
        assert whole.usage_metadata["input_tokens"] == called.usage_metadata["input_tokens"]
        assert record(whole)["digest"] == record(called)["digest"]
    assert asyncio.run(model.ainvoke(ASKED, seed=5)).content == called.content


def test_a_streamed_answer_is_gone_on_from(place: Any) -> None:
    model = place.model()
    first = merged(list(model.stream(ASKED)))
    second = model.invoke([*ASKED, first, HumanMessage("And then?")])
    assert record(second)["parent"] == point_of(first) and record(second)["source"] == "live"


def test_a_stream_that_nobody_reads_to_its_end_leaves_nothing(place: Any) -> None:
    model = place.model(sampling=thaw.Sampling(max_tokens=4000, ignore_eos=True))
    stream = model.stream(ASKED)
    next(stream)
    stream.close()
    before = place.num_forwarded
    assert place.repo.match(place.engine.codec.encode_chat("<s>system\nBe brief.")) is None
    assert place.num_forwarded - before < 1000 and list(place.repo.store.commits()) == []


def test_a_task_that_is_cancelled_leaves_nothing(place: Any) -> None:
    model = place.model(sampling=thaw.Sampling(max_tokens=20_000, ignore_eos=True))

    async def cancelled() -> None:
        task = asyncio.create_task(model.ainvoke(ASKED))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert list(place.repo.store.commits()) == []


@pytest.mark.parametrize("live_sessions", [0, 8])
def test_four_branches_of_one_point_load_it_once(begin: Callable[..., Any], live_sessions: int) -> None:
    place = begin()
    read = place.model().invoke(ASKED)
    place.reopen()
    model = place.model(live_sessions=live_sessions)
    start = threading.Barrier(4)

    def ask(question: str) -> AIMessage:
        start.wait()
        return model.invoke([*ASKED, read, HumanMessage(question)])

    before = place.num_forwarded
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(ask, ("Why?", "How?", "Who?", "When?")))
    ran = place.num_forwarded - before
    sources = sorted(record(one)["source"] for one in answers)
    assert sources == (["live"] * 3 + ["stored"] if live_sessions else ["stored"] * 4)
    assert {record(one)["parent"] for one in answers} == {point_of(read)} and len({one.content for one in answers}) == 4
    assert ran == sum(record(one)["prefilled_tokens"] + one.usage_metadata["output_tokens"] - 1 for one in answers)
    assert all(record(one)["prefilled_tokens"] < 40 for one in answers)


def test_several_answers_are_one_batch_and_read_the_prompt_once(place: Any) -> None:
    model = place.model()
    before = place.num_forwarded
    answers = model.attempts(ASKED, 4)
    ran = place.num_forwarded - before
    num_prompt = answers[0].usage_metadata["input_tokens"]
    assert len({point_of(one) for one in answers}) == 4 and len({one.content for one in answers}) == 4
    assert ran < num_prompt + 4 * SAMPLING.max_tokens
    assert record(answers[0])["cached_tokens"] == 0
    assert all(record(one)["cached_tokens"] >= num_prompt - 1 for one in answers[1:])
    follow = model.invoke([*ASKED, answers[2], HumanMessage("And then?")])
    assert record(follow)["parent"] == point_of(answers[2])
    again = [one.content for one in model.attempts(ASKED, 3, seed=3)]
    assert again == [one.content for one in asyncio.run(model.aattempts(ASKED, 3, seed=3))]


def test_sampling_is_the_models_and_a_call_changes_it(place: Any) -> None:
    model = place.model()
    assert model.invoke(ASKED, max_tokens=3).usage_metadata["output_tokens"] == 3
    assert model.bind(max_tokens=4, temperature=0).invoke(ASKED).usage_metadata["output_tokens"] == 4
    assert model.invoke(ASKED).response_metadata["finish_reason"] == "length"
    with pytest.raises(BadSampling, match="temperature"):
        model.invoke(ASKED, temperature=-1)
    with pytest.raises(InvalidRequest, match="'tempreature'"):
        model.invoke(ASKED, tempreature=1)
    with pytest.raises(Unsupported, match="attempts"):
        list(model.stream(ASKED, n=2))


def look_up(path: str) -> str:
    """Read a file."""
    return path


def test_tools_are_shown_to_the_model_and_stay_part_of_the_prefix(place: Any) -> None:
    model = place.model(tool_calls="hermes").bind_tools([look_up])
    first = model.invoke(ASKED)
    assert "look_up" in place.repo.show(point_of(first)).text
    call = {"name": "look_up", "args": {"path": "a"}, "id": "1"}
    history = [
        *ASKED, first, HumanMessage("Look."), AIMessage("", tool_calls=[call]), ToolMessage("no", tool_call_id="1"),
    ]  # fmt: skip
    answer = model.invoke(history)
    assert record(answer)["parent"] == point_of(first)
    # Without tools the prompt begins otherwise, and nothing of it is used.
    bare = place.model().invoke(history)
    assert record(bare)["parent"] is None and record(bare)["cached_tokens"] <= 1


def test_what_an_engine_cannot_do_is_refused_by_name(place: Any) -> None:
    class Answer(BaseModel):
        text: str

    model = place.model()
    with pytest.raises(Unsupported, match="fake has no structured output"):
        model.with_structured_output(Answer)
    with pytest.raises(Unsupported, match="cannot be forced"):
        place.model(tool_calls="hermes").bind_tools([look_up], tool_choice="look_up")
    with pytest.raises(Unsupported, match="parallel_tool_calls"):
        place.model(tool_calls="hermes").bind_tools([look_up], parallel_tool_calls=False)
    with pytest.raises(InvalidRequest, match="'tool_choice'"):
        model.invoke(ASKED, tool_choice="any")
    with pytest.raises(InvalidRequest, match="hermes"):
        model.bind_tools([look_up])
    picture = HumanMessage([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}])
    with pytest.raises(Unsupported, match="only text"):
        model.invoke([picture])
    with pytest.raises(InvalidRequest, match="one of repo, pool, base_url"):
        ChatThaw()


# -- a pool


def test_a_pool_is_gone_on_from_in_any_worker(tmp_path: Path) -> None:
    with (
        thaw.open(tmp_path / "runs", create=True) as repo,
        thaw.ForkPool("fake", workers=2, backend="inline", repo=repo) as pool,
    ):
        model = ChatThaw(pool=pool, sampling=SAMPLING)
        first = model.invoke(ASKED)
        second = model.invoke([*ASKED, first, HumanMessage("And then?")])
        assert record(second)["parent"] == point_of(first) and record(second)["source"] == "live"
        model.close()
        third = model.invoke([*ASKED, first, HumanMessage("Otherwise?")])
        assert record(third)["source"] == "stored" and record(third)["prefilled_tokens"] < 40
        assert len({point_of(one) for one in model.attempts([*ASKED, first, HumanMessage("Why?")], 3)}) == 3
        model.close()
        with pytest.raises(InvalidRequest, match="no repository"), thaw.ForkPool("fake", backend="inline") as bare:
            ChatThaw(pool=bare)


# -- a gateway


@pytest.fixture
def server() -> None:
    for package in ("starlette", "uvicorn"):
        pytest.importorskip(package, reason="the extra [server] is not installed")


@pytest.fixture
def gateway(server: None, tmp_path: Path) -> Any:
    from gateway_stand import TOKEN, Gateway
    from thaw.gateway.settings import GatewaySettings
    from thaw.gateway.tenants import single

    with thaw.load_engine("fake") as engine:
        running = Gateway(tmp_path / "served", engine, single(TOKEN), GatewaySettings())
        yield running
        running.close()


def model_of(gateway: Any, **options: Any) -> ChatThaw:
    from gateway_stand import TOKEN

    return ChatThaw(base_url=gateway.url, api_key=TOKEN, **{"sampling": SAMPLING, **options})


def test_a_gateway_is_asked_for_the_deepest_point(gateway: Any) -> None:
    model = model_of(gateway)
    first = model.invoke(ASKED)
    history = [*ASKED, first, HumanMessage("And then?")]
    before = gateway.num_forwarded
    second = model.invoke(history)
    ran = gateway.num_forwarded - before
    num_prefix = len(gateway.repo.show(point_of(first)).tokens)
    assert record(second)["parent"] == point_of(first)
    assert second.usage_metadata["input_token_details"]["cache_read"] == num_prefix - 1
    assert ran == record(second)["prefilled_tokens"] + second.usage_metadata["output_tokens"] - 1

    async def both() -> tuple[Any, Any]:
        return await model.ainvoke(history, seed=5), [chunk async for chunk in model.astream(history, seed=5)]

    called, chunks = asyncio.run(both())
    whole, streamed = merged(chunks), merged(list(model.stream(history, seed=5)))
    assert called.content == whole.content == streamed.content and len(chunks) > 5
    assert {record(one)["parent"] for one in (called, whole, streamed)} == {point_of(first)}
    third = model.invoke([*history, streamed, HumanMessage("Why?")])
    assert record(third)["parent"] == point_of(streamed)


def test_a_message_that_was_edited_reaches_a_gateway(gateway: Any) -> None:
    """A point is named only where the messages before it are those that it holds."""
    model = model_of(gateway)
    first = model.invoke(ASKED)
    edited = [ASKED[0], HumanMessage(f"{LONG}No river."), first, HumanMessage("And then?")]
    answer = model.invoke(edited)
    said = gateway.repo.show(point_of(answer)).text
    assert "No river." in said and said.count(LONG) == 1 and record(answer)["parent"] != point_of(first)


def test_a_gateway_gives_several_answers_with_a_point_each(gateway: Any) -> None:
    model = model_of(gateway)
    answers = model.attempts(ASKED, 3)
    assert len({point_of(one) for one in answers}) == 3
    assert [one.usage_metadata["output_tokens"] for one in answers] == [SAMPLING.max_tokens] * 3
    assert all(record(one)["mean_logprob"] < 0 for one in answers)
    follow = model.invoke([*ASKED, answers[2], HumanMessage("And then?")])
    assert record(follow)["parent"] == point_of(answers[2])
    assert len(asyncio.run(model.aattempts(ASKED, 2))) == 2


def test_a_point_that_a_gateway_does_not_have_is_read_again(gateway: Any, begin: Callable[..., Any]) -> None:
    first = begin().model().invoke(ASKED)
    history = [*ASKED, first, HumanMessage("And then?")]
    model = model_of(gateway)
    for answer in (model.invoke(history), merged(list(model.stream(history))), asyncio.run(model.ainvoke(history))):
        assert record(answer)["reread"]["kind"] == "not-found" and record(answer)["parent"] is not point_of(first)


def test_what_a_gateway_refuses_is_thaws_own_error(gateway: Any) -> None:
    with pytest.raises(InvalidRequest, match="401"):
        ChatThaw(base_url=gateway.url, api_key="wrong").invoke(ASKED)
    model = model_of(gateway)
    with pytest.raises(InvalidRequest, match="structured"):
        model.with_structured_output({"title": "answer", "type": "object", "properties": {}}).invoke(ASKED)
    with pytest.raises(thaw.ThawError, match="thaw serve"):
        ChatThaw(base_url="http://127.0.0.1:9", api_key="x").invoke(ASKED)


def test_a_savers_threads_keep_the_gateways_points(gateway: Any) -> None:
    from thaw.integrations.langgraph import ThawSaver

    model = model_of(gateway)
    graph = StateGraph(MessagesState)
    graph.add_node("answer", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_edge(START, "answer")
    with thaw.open(gateway.folder) as repo, ThawSaver(repo) as saver:
        done = graph.compile(checkpointer=saver).invoke({"messages": ASKED}, THREAD)
        assert [tag.target for tag in repo.tags()] == [point_of(done["messages"][-1])]


# -- nodes


def test_the_best_of_n_goes_on_and_gc_frees_the_others(place: Any) -> None:
    model, seen = place.model(), []

    def longest(messages: Any, attempts: Any) -> int:
        seen.append((len(messages), len(attempts)))
        return 2

    graph = StateGraph(MessagesState)
    graph.add_node("answer", best_of_n(model, 4, longest))
    graph.add_edge(START, "answer")
    runs = graph.compile(checkpointer=place.saver())
    done = runs.invoke({"messages": ASKED}, THREAD)
    assert seen == [(2, 4)] and len(done["messages"]) == 3
    model.close()
    assert place.gc().commits_removed == 3
    after = runs.invoke({"messages": [HumanMessage("And then?")]}, THREAD)
    assert record(after["messages"][-1])["parent"] == point_of(done["messages"][-1])


class Tried(MessagesState):
    attempts: list[Any]


def test_attempts_and_the_pick_are_nodes_of_their_own(place: Any) -> None:
    from thaw.integrations.langgraph import attempts, likeliest, pick

    async def judged(messages: Any, made: Any) -> list[float]:
        await asyncio.sleep(0)
        return likeliest(messages, made)

    def compiled(judge: Any) -> Any:
        graph = StateGraph(Tried)
        graph.add_node("try", attempts(place.model(), 3))
        graph.add_node("pick", pick(judge))
        graph.add_edge(START, "try")
        graph.add_edge("try", "pick")
        graph.add_edge("pick", END)
        return graph.compile()

    done = asyncio.run(compiled(judged).ainvoke({"messages": ASKED}))
    assert done["attempts"] == [] and isinstance(done["messages"][-1], AIMessage)
    done = compiled(likeliest).invoke({"messages": ASKED})
    assert point_of(done["messages"][-1])
    with pytest.raises(InvalidRequest, match="ainvoke"):
        compiled(judged).invoke({"messages": ASKED})
    for verdict, why in ((3, "number 3 of 3"), ([1.0], "1 scores for 3")):
        with pytest.raises(InvalidRequest, match=why):
            compiled(lambda messages, made, verdict=verdict: verdict).invoke({"messages": ASKED})


def test_tokens_of_a_node_are_streamed_by_the_graph(place: Any) -> None:
    model = place.model()
    graph = StateGraph(MessagesState)
    graph.add_node("answer", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_edge(START, "answer")
    runs = graph.compile(checkpointer=place.saver())
    chunks = [chunk for chunk, _ in runs.stream({"messages": ASKED}, THREAD, stream_mode="messages")]
    assert len(chunks) > 5
    last = runs.get_state(THREAD).values["messages"][-1]
    assert point_of(last) and merged(chunks).content == last.content


def test_any_judge_is_understood_or_refused_by_name(place: Any) -> None:
    """A number may be NumPy's or PyTorch's; a score that is none chooses nothing."""
    torch = pytest.importorskip("torch", reason="no torch here")
    model = place.model()
    for verdict, number in ((torch.tensor(2), 2), (torch.tensor([0.1, 0.9, 0.2]), 1), ([1, 1, 0], 0)):
        seen: list[Any] = []

        def judge(messages: Any, made: Any, verdict: Any = verdict, seen: list[Any] = seen) -> Any:
            seen.extend(made)
            return verdict

        (winner,) = best_of_n(model, 3, judge).invoke({"messages": ASKED})["messages"]
        assert len(seen) == 3 and point_of(winner) == point_of(seen[number])
    for bad, why in ((None, "None"), (1.5, "1.5"), ([float("nan"), 1, 0], "no numbers"), ([1, 0], "2 scores for 3")):
        with pytest.raises(InvalidRequest, match=why):
            best_of_n(model, 3, lambda messages, made, bad=bad: bad).invoke({"messages": ASKED})


def test_many_answers_leave_nothing_behind_but_the_sessions_that_stay_open(place: Any) -> None:
    model = place.model(live_sessions=2)
    messages: list[BaseMessage] = [*ASKED]
    for number in range(6):
        messages += [model.invoke(messages), HumanMessage(f"And then, {number}?")]
    trunks = model._source._trunks
    assert len(trunks._sessions) == 2 and trunks._loading == {}


@pytest.mark.parametrize("over", ["engine", "gateway"])
def test_what_cannot_be_sent_or_recorded_is_named_before_anything_is_asked(
    over: str, place: Any, request: pytest.FixtureRequest
) -> None:
    make = partial(model_of, request.getfixturevalue("gateway")) if over == "gateway" else place.model
    with pytest.raises(InvalidRequest, match="note holds half a character"):
        make(note="\ud800")
    model = make()
    for value in (object(), "\ud800", float("nan")):
        with pytest.raises(InvalidRequest, match="chat_template_kwargs: must be JSON"):
            model.bind(chat_template_kwargs={"x": value}).invoke(ASKED)
    model.close()
    assert point_of(model.invoke(ASKED))


def test_an_address_or_key_that_is_none_is_named_and_not_shown() -> None:
    for url in ("nonsense", "http://[::1", "ftp://127.0.0.1", ""):
        with pytest.raises(InvalidRequest, match="base_url="):
            ChatThaw(base_url=url, api_key="key")
    for key in ("schlüssel", "a\nb"):
        with pytest.raises(InvalidRequest, match="api_key: must be printable ASCII") as refused:
            ChatThaw(base_url="http://127.0.0.1:1", api_key=key)
        assert key not in str(refused.value)


@pytest.mark.parametrize("over", ["engine", "gateway"])
def test_commits_are_called_as_what_the_human_said_last(over: str, place: Any, request: pytest.FixtureRequest) -> None:
    """On one line, cut; after a tool's answer too; a note of one's own takes its place."""
    gateway = request.getfixturevalue("gateway") if over == "gateway" else None
    make, repo = (place.model, place.repo) if gateway is None else (partial(model_of, gateway), gateway.repo)

    def message(answer: AIMessage) -> str:
        return str(repo.show(point_of(answer) or "").entry.message)

    def called(model: ChatThaw, said: list[BaseMessage]) -> str:
        return message(model.invoke(said))

    assert called(make(), [*ASKED, AIMessage("x"), HumanMessage("And\n  then?")]) == "And then?"
    asked = AIMessage("", tool_calls=[{"name": "look", "args": {}, "id": "1"}])
    long = called(make(), [HumanMessage("a river " * 40), asked, ToolMessage("deep", tool_call_id="1")])
    assert long.startswith("a river a river") and long.endswith("…") and len(long) <= 72
    assert called(make(), [HumanMessage([{"type": "text", "text": "in parts"}])]) == "in parts"
    assert called(make(), [SystemMessage("Begin.")]) == "langgraph"
    assert called(make(note="review"), ASKED) == "review"
    assert [message(one) for one in make().attempts([HumanMessage("Go.")], 2)] == ["Go.", "Go."]
