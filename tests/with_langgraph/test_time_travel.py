"""Where a graph continues from: the messages' own points, by the engine's count of what it computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, RemoveMessage, SystemMessage

from langgraph_stand import LONG, THREAD, after_step, graph_of, num_prefix, record, ten_steps
from thaw.integrations.langgraph import point_of


@pytest.mark.parametrize("restarted", [False, True])
def test_time_travel_to_step_3_prefills_no_token_of_the_prefix(place: Any, restarted: bool) -> None:
    graph = graph_of(place.model(), place.saver())
    ten_steps(graph)
    if restarted:
        place.reopen()
        graph = graph_of(place.model(), place.saver())
    third = after_step(graph, 3)
    prefix = num_prefix(place, third.values["messages"][-1])

    before = place.num_forwarded
    forked = graph.invoke({"messages": [HumanMessage("Otherwise?")]}, third.config)
    ran, answer = place.num_forwarded - before, forked["messages"][-1]

    said = record(answer)
    assert said["source"] == ("stored" if restarted else "live") and "reread" not in said
    assert said["parent"] == point_of(third.values["messages"][-1])
    num_prompt = answer.usage_metadata["input_tokens"]
    # The last sampled token of a session has no KV yet, in the uninterrupted parent neither.
    assert answer.usage_metadata["input_token_details"] == {"cache_read": prefix - 1}
    assert ran == num_prompt - (prefix - 1) + answer.usage_metadata["output_tokens"] - 1
    assert len(forked["messages"]) == 8


def test_without_its_point_the_same_call_prefills_all_of_it(place: Any) -> None:
    """The negative control of the test before."""
    model = place.model(match=False)
    graph = graph_of(model, place.saver())
    ten_steps(graph)
    messages = after_step(graph, 3).values["messages"]
    bare = [one.model_copy(update={"response_metadata": {}}) if isinstance(one, AIMessage) else one for one in messages]
    before = place.num_forwarded
    answer = model.invoke([*bare, HumanMessage("Otherwise?")])
    ran = place.num_forwarded - before
    assert record(answer)["source"] == "new" and answer.usage_metadata["input_token_details"] == {"cache_read": 0}
    assert ran == answer.usage_metadata["input_tokens"] + answer.usage_metadata["output_tokens"] - 1
    assert ran > num_prefix(place, messages[-1])


def test_the_longest_stored_prefix_is_found_without_a_point(place: Any) -> None:
    """Another thread that begins alike; by its tokens alone."""
    model = place.model()
    first = model.invoke([HumanMessage(LONG)])
    other = model.invoke([HumanMessage(LONG + "And who else?")])
    shared = other.usage_metadata["input_token_details"]["cache_read"]
    assert shared >= len(LONG) and record(first)["source"] == "new" != record(other)["source"]


def test_update_state_forks_where_the_messages_part(place: Any) -> None:
    graph = graph_of(place.model(), place.saver())
    ten_steps(graph)
    fifth = after_step(graph, 5)
    dropped = [RemoveMessage(id=one.id) for one in fifth.values["messages"][6:]]
    edited = graph.update_state(fifth.config, {"messages": dropped})
    forked = graph.invoke({"messages": [HumanMessage("Otherwise?")]}, edited)
    third = fifth.values["messages"][5]
    assert record(forked["messages"][-1])["parent"] == point_of(third)
    cached = forked["messages"][-1].usage_metadata["input_token_details"]["cache_read"]
    assert cached == num_prefix(place, third) - 1


def test_an_edited_message_costs_what_comes_after_it(place: Any) -> None:
    """The points behind it do not fit any more; the deepest one before it does."""
    graph = graph_of(place.model(), place.saver())
    ten_steps(graph)
    messages = after_step(graph, 5).values["messages"]
    edited = HumanMessage("And then, in another way?", id=messages[6].id)
    before = place.num_forwarded
    answer = place.model().invoke([*messages[:6], edited, *messages[7:], HumanMessage("Otherwise?")])
    ran = place.num_forwarded - before
    prefix = num_prefix(place, messages[5])
    assert record(answer)["parent"] == point_of(messages[5])
    assert answer.usage_metadata["input_token_details"]["cache_read"] >= prefix - 1
    assert ran <= answer.usage_metadata["input_tokens"] - (prefix - 1) + answer.usage_metadata["output_tokens"]


def test_another_system_message_reads_the_conversation_again(place: Any) -> None:
    """No KV of another prompt is used, whatever points the messages carry."""
    model = place.model()
    history = [SystemMessage("Be brief."), HumanMessage(LONG)]
    history += [model.invoke(history), HumanMessage("And then?")]
    answer = model.invoke([SystemMessage("Be long and slow."), *history[1:]])
    common = len("_system\nBe ")
    assert answer.usage_metadata["input_token_details"]["cache_read"] <= common
    fresh = place.model(match=False).invoke(
        [SystemMessage("Be long and slow."), HumanMessage(LONG), AIMessage(history[2].content), history[3]], seed=1
    )
    again = model.invoke([SystemMessage("Be long and slow."), *history[1:]], seed=1)
    assert again.content == fresh.content
    assert record(answer)["parent"] is None


def test_a_thread_that_moves_to_another_model_reads_again_and_says_so(begin: Callable[..., Any]) -> None:
    place = begin()
    ten_steps(graph_of(place.model(), place.saver()))
    place.reopen(seed=7)
    graph = graph_of(place.model(), place.saver())
    moved = graph.invoke({"messages": [HumanMessage("Still there?")]}, THREAD)["messages"][-1]
    said = record(moved)
    assert said["reread"]["kind"] == "identity-mismatch" and "weights" in said["reread"]["why"]
    assert said["source"] == "new" and said["cached_tokens"] == 0
    # From here on the other model continues from its own points.
    after = graph.invoke({"messages": [HumanMessage("And now?")]}, THREAD)["messages"][-1]
    assert "reread" not in record(after) and record(after)["parent"] == point_of(moved)


def test_a_freed_point_is_read_again_and_says_so(place: Any) -> None:
    model = place.model()
    history: list[BaseMessage] = [HumanMessage(LONG)]
    history += [model.invoke(history), HumanMessage("And then?")]
    model.close()
    assert place.gc().commits_removed == 1
    answer = model.invoke(history)
    assert record(answer)["reread"]["kind"] == "not-found" and record(answer)["cached_tokens"] == 0


def test_a_point_in_another_repository_is_read_again(begin: Callable[..., Any], tmp_path: Path) -> None:
    history: list[BaseMessage] = [HumanMessage(LONG)]
    history += [begin("one").model().invoke(history), HumanMessage("And then?")]
    answer = begin("two").model().invoke(history)
    assert record(answer)["reread"]["kind"] == "not-found"
