"""The checkpointer: LangGraph's own suite, counted, and how long points are kept."""

from __future__ import annotations

import asyncio
import dataclasses
import operator
import stat
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.messages import AIMessage, HumanMessage, messages_to_dict
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.graph import START, StateGraph
from langgraph.types import Send
from pydantic import BaseModel

import thaw
from langgraph_stand import LONG, THREAD, after_step, graph_of, num_prefix, ten_steps
from thaw.core.errors import InvalidRequest
from thaw.core.objects import Commit, State
from thaw.integrations.langgraph import ThawSaver, point_of
from thaw.integrations.langgraph.messages import points_in

CONFORMANCE = {
    "put": 17, "put_writes": 10, "get_tuple": 10, "list": 16, "delete_thread": 5, "delete_for_runs": 7,
    "copy_thread": 8, "prune": 8,
}  # fmt: skip
"""Tests of each capability in version 0.0.2 of the suite, which counts a capability that it does not see as passed."""


def joined(state: list[str], writes: list[list[str]]) -> list[str]:
    return [*state, *(one for some in writes for one in some)]


class Words(TypedDict):
    words: Annotated[list[str], DeltaChannel(joined, list, snapshot_frequency=4)]


def tags(place: Any) -> set[str]:
    return {tag.name for tag in place.repo.tags()}


def points_of_thread(saver: ThawSaver, thread: str = "story") -> set[str]:
    config = {"configurable": {"thread_id": thread}}
    return {point for one in saver.list(config) for point in points_in(one.checkpoint["channel_values"])}


def test_the_conformance_suite_ran_and_passed(tmp_path: Path) -> None:
    conformance = pytest.importorskip("langgraph.checkpoint.conformance", reason="the suite is not installed")

    @conformance.checkpointer_test(name="ThawSaver")
    async def made() -> AsyncIterator[ThawSaver]:
        async with ThawSaver(tmp_path / "runs") as saver:
            yield saver

    report = asyncio.run(conformance.validate(made))
    assert report.passed_all_base() and report.passed_all()
    assert {name: (found.tests_passed, found.failures) for name, found in report.results.items()} == {
        name: (count, []) for name, count in CONFORMANCE.items()
    }


def test_the_suite_counts_a_saver_that_does_nothing_as_passed() -> None:
    """Why its tests are counted above."""
    conformance = pytest.importorskip("langgraph.checkpoint.conformance", reason="the suite is not installed")
    from langgraph.checkpoint.base import BaseCheckpointSaver

    @conformance.checkpointer_test(name="nothing")
    async def made() -> AsyncIterator[Any]:
        yield BaseCheckpointSaver()

    report = asyncio.run(conformance.validate(made))
    assert report.passed_all() and sum(found.tests_passed for found in report.results.values()) == 0


def test_each_point_of_a_checkpoint_has_a_tag_of_the_thread(place: Any) -> None:
    saver = place.saver()
    ten_steps(graph_of(place.model(), saver))
    points = points_of_thread(saver)
    assert len(points) == 10
    assert {tag.target for tag in place.repo.tags()} == points
    assert all(name.startswith("langgraph/story/") for name in tags(place))


def fork_after_3(place: Any, saver: ThawSaver) -> Any:
    """Ten steps, and a fork of the third: the seven after it are a branch that nothing continues from."""
    graph = graph_of(place.model(), saver)
    ten_steps(graph)
    graph.invoke({"messages": [HumanMessage("Otherwise? " * 40)]}, after_step(graph, 3).config)
    return graph


def test_prune_frees_the_kv_of_what_was_given_up(place: Any) -> None:
    saver = place.saver()
    graph = fork_after_3(place, saver)
    kept = graph.get_state(THREAD).values["messages"]
    before = place.gc()
    assert before.commits_removed == 0 and before.blobs_removed == 0

    saver.prune(["story"])
    after = place.gc()
    assert after.commits_removed == 7 and after.blobs_removed > 0
    assert after.nbytes_kept < before.nbytes_kept
    # What is left goes on without prefilling anything again.
    place.reopen()
    graph = graph_of(place.model(), place.saver())
    answer = graph.invoke({"messages": [HumanMessage("And then?")]}, THREAD)["messages"][-1]
    cached = answer.usage_metadata["input_token_details"]["cache_read"]
    assert cached == num_prefix(place, kept[-1]) - 1


def test_without_prune_gc_frees_nothing_of_a_thread(place: Any) -> None:
    """The negative control."""
    fork_after_3(place, place.saver())
    assert place.gc().blobs_removed == 0


def test_deleting_a_thread_frees_all_of_its_kv(place: Any) -> None:
    saver = place.saver()
    ten_steps(graph_of(place.model(), saver))
    saver.delete_thread("story")
    report = place.gc()
    assert report.commits_removed == 10 and report.nbytes_kept == 0 and tags(place) == set()


def test_a_copied_thread_keeps_the_points_of_the_one_that_is_deleted(place: Any) -> None:
    saver = place.saver()
    ten_steps(graph_of(place.model(), saver))
    saver.copy_thread("story", "a thread: of another name/…")
    saver.delete_thread("story")
    report = place.gc()
    assert report.commits_removed == 0 and len(tags(place)) == 10
    place.reopen()
    graph = graph_of(place.model(), place.saver())
    copy = {"configurable": {"thread_id": "a thread: of another name/…"}}
    answer = graph.invoke({"messages": [HumanMessage("And then?")]}, copy)["messages"][-1]
    assert answer.response_metadata["thaw"]["source"] == "stored"


def test_deleting_runs_drops_what_they_alone_named(place: Any) -> None:
    saver = place.saver()
    graph = graph_of(place.model(), saver)
    first = {**THREAD, "metadata": {"run_id": "one"}}
    graph.invoke({"messages": [HumanMessage(LONG)]}, first)
    named = points_of_thread(saver)
    graph.invoke({"messages": [HumanMessage("And then?")]}, {**THREAD, "metadata": {"run_id": "two"}})
    saver.delete_for_runs(["two"])
    assert points_of_thread(saver) == named == {tag.target for tag in place.repo.tags()}


def test_what_a_failed_step_wrote_is_kept(place: Any) -> None:
    """One of two nodes fails: the other's answer is a pending write, and is not computed again."""
    model, calls = place.model(), []

    class State(TypedDict):
        messages: Annotated[list[Any], operator.add]
        other: str

    def answer(state: State) -> dict[str, Any]:
        calls.append("answer")
        return {"messages": [model.invoke([HumanMessage(LONG)])]}

    def fails(state: State) -> dict[str, Any]:
        calls.append("fails")
        if calls.count("fails") == 1:
            raise OSError("no network")
        return {"other": "done"}

    graph = StateGraph(State)
    graph.add_node("answer", answer)
    graph.add_node("fails", fails)
    graph.add_edge(START, "answer")
    graph.add_edge(START, "fails")
    runs = graph.compile(checkpointer=place.saver())
    with pytest.raises(OSError):
        runs.invoke({"messages": []}, THREAD)
    assert place.gc().commits_removed == 0 and len(tags(place)) == 1
    done = runs.invoke(None, THREAD)
    assert calls == ["answer", "fails", "fails"] and place.repo.show(point_of(done["messages"][0]))


def test_pruning_keeps_what_a_delta_channel_is_read_from(place: Any) -> None:
    saver = place.saver()
    graph = StateGraph(Words)
    graph.add_node("say", lambda state: {"words": [f"word {len(state['words'])}"]})
    graph.add_edge(START, "say")
    runs = graph.compile(checkpointer=saver)
    for _ in range(7):
        runs.invoke({"words": ["in"]}, THREAD)
    whole, many = runs.get_state(THREAD).values, len(list(saver.list(THREAD)))
    saver.prune(["story"])
    assert runs.get_state(THREAD).values == whole and len(whole["words"]) == 14
    assert 1 < len(list(saver.list(THREAD))) < many
    assert asyncio.run(runs.aget_state(THREAD)).values == whole


def test_checkpoints_are_there_in_another_process_and_in_no_other_namespace(tmp_path: Path) -> None:
    config = {"configurable": {"thread_id": "story", "checkpoint_ns": ""}}
    with thaw.open(tmp_path / "runs", create=True) as repo, ThawSaver(repo.within("acme")) as saver:
        checkpoint = {**empty_checkpoint(), "channel_values": {"a": 1}, "channel_versions": {"a": "1"}}
        stored = saver.put(config, checkpoint, {"source": "input", "step": -1}, {"a": "1"})
    with thaw.open(tmp_path / "runs") as repo:
        with ThawSaver(repo) as other:
            assert other.get_tuple(config) is None and list(other.list(None)) == []
        with ThawSaver(repo.within("acme")) as again:
            found = again.get_tuple(config)
    assert found is not None and found.config == stored and found.checkpoint["channel_values"] == {"a": 1}


def test_a_value_is_stored_once_and_its_file_is_its_owners(place: Any) -> None:
    saver = place.saver()
    file = place.folder / "langgraph.db"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    big = "x" * 100_000
    for number in range(20):
        values = {"big": big, "n": number}
        checkpoint = {**empty_checkpoint(), "channel_values": values, "channel_versions": {"big": "1", "n": "1"}}
        config = {"configurable": {"thread_id": f"t{number}", "checkpoint_ns": ""}}
        saver.put(config, checkpoint, {"source": "loop", "step": 0}, {"big": "1", "n": "1"})
    saver.close()
    assert file.stat().st_size < 5 * len(big)


@dataclasses.dataclass
class Held:
    answers: list[AIMessage]


class Model(BaseModel):
    answer: Any


def test_points_are_found_wherever_a_message_is(place: Any) -> None:
    answer = place.model().invoke([HumanMessage("hello")])
    point = point_of(answer)
    for value in (
        answer, [answer], {"a": ({"b": answer},)}, Held([answer]), Model(answer=[answer]), Send("node", {"a": answer}),
        deque([answer]), {"dumped": answer.model_dump()}, messages_to_dict([answer]),
    ):  # fmt: skip
        assert points_in(value) == {point}, value
    assert points_in([answer.content, point, HumanMessage("hello"), None]) == set()
    endless: list[Any] = [answer]
    endless.append(endless)
    assert points_in(endless) == {point}


def put_at(saver: ThawSaver, place: Any, value: Any, **about: Any) -> None:
    checkpoint = {**empty_checkpoint(), "channel_values": {"m": value}, "channel_versions": {"m": "1"}}
    config = {"configurable": {"checkpoint_ns": "", **place}}
    saver.put(config, checkpoint, {"source": "loop", "step": 0, **about}, {"m": "1"})


def test_a_window_of_messages_keeps_its_kv(place: Any) -> None:
    """A state of the last few messages, in a deque: gc frees nothing that a checkpoint names."""
    saver = place.saver()
    answer = place.model().invoke([HumanMessage(LONG)])
    put_at(saver, {"thread_id": "story"}, deque([answer], maxlen=4))
    assert place.gc().commits_removed == 0
    saver.delete_thread("story")
    assert place.gc().commits_removed == 1


def test_a_message_that_names_what_is_no_commit_is_stored_as_any_other(place: Any) -> None:
    """A client may send any message; ids of a state, of a model and of nothing are nobody's points."""
    saver = place.saver()
    commit = place.repo.store.get_as(point_of(place.model().invoke([HumanMessage(LONG)])), Commit)
    state = place.repo.store.get_as(commit.state, State)
    for point in (commit.state, state.model, f"b3:{'0' * 64}"):
        put_at(saver, {"thread_id": "story"}, [AIMessage("hi", response_metadata={"thaw": {"point": point}})])
        found = saver.get_tuple(THREAD)
        assert (
            found is not None and found.checkpoint["channel_values"]["m"][0].response_metadata["thaw"]["point"] == point
        )
    assert tags(place) == set()


def test_threads_and_runs_that_are_no_strings_are_found_again(place: Any) -> None:
    """LangGraph takes 7 and "7" as one thread, and makes UUIDs of runs."""
    saver, run = place.saver(), uuid.uuid4()
    answer = place.model().invoke([HumanMessage(LONG)])
    for forget in (
        lambda: saver.delete_thread(7),
        lambda: saver.prune([7], strategy="delete"),
        lambda: saver.delete_for_runs([run]),
    ):
        put_at(saver, {"thread_id": 7, "checkpoint_ns": None}, [answer], run_id=run)
        assert saver.get_tuple({"configurable": {"thread_id": "7"}}) is not None and len(tags(place)) == 1
        forget()
        assert list(saver.list(None)) == [] and tags(place) == set()
    put_at(saver, {"thread_id": 7}, [answer])
    saver.copy_thread(7, 8)
    assert len(tags(place)) == 2


def test_half_a_character_is_named_and_nothing_is_kept(place: Any) -> None:
    saver = place.saver()
    for config, about in (({"thread_id": "\ud800"}, {}), ({"thread_id": "a"}, {"run_id": "\ud800"})):
        with pytest.raises(InvalidRequest, match="half a character"):
            put_at(saver, config, 1, **about)
    with pytest.raises(InvalidRequest, match=r"messages\[1\] holds half a character"):
        place.model().invoke([HumanMessage("hello"), HumanMessage("\ud800")])
    assert list(saver.list(None)) == [] and list(place.repo.store.commits()) == []


def test_what_is_asked_wrongly_is_named(place: Any) -> None:
    saver = place.saver()
    with pytest.raises(InvalidRequest, match="keep_latest"):
        saver.prune(["story"], strategy="keep_all")
    with pytest.raises(InvalidRequest, match="thread_id"):
        saver.get_tuple({"configurable": {}})
    with pytest.raises(InvalidRequest, match="thread_id"):
        list(saver.list({}))


def test_tags_that_somebody_else_made_are_left_alone(begin: Callable[..., Any]) -> None:
    place = begin()
    saver = place.saver()
    graph = graph_of(place.model(), saver)
    graph.invoke({"messages": [HumanMessage(LONG)]}, THREAD)
    point = points_of_thread(saver).pop()
    for name in ("mine", "langgraph/best", "langgraph/the/best"):
        place.repo.tag(name, point)
    place.repo.delete_tag(
        next(name for name in tags(place) if name.startswith("langgraph/story/"))
    )  # and one of the saver's is lost
    place.reopen()
    place.saver()
    assert len(tags(place)) == 4 and {"mine", "langgraph/best", "langgraph/the/best"} < tags(place)
