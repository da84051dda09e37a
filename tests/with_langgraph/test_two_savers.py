"""Several savers of one repository, in several processes: no tag is dropped that another one's checkpoint needs."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from langchain_core.messages import HumanMessage
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Send

import thaw
from langgraph_stand import LONG, THREAD, record
from thaw.integrations.langgraph import ThawSaver, point_of
from thaw.integrations.langgraph.messages import points_in

WORKER = """
import sys
import thaw
from langchain_core.messages import AIMessage
from langgraph.checkpoint.base import empty_checkpoint
from thaw.integrations.langgraph import ThawSaver

folder, who, points = sys.argv[1], sys.argv[2], sys.argv[3:]
with thaw.open(folder) as repo:
    for number in range(12):
        with ThawSaver(repo) as saver:  # which drops tags that no checkpoint asks for
            for point in points:
                message = AIMessage("hi", response_metadata={"thaw": {"point": point}})
                checkpoint = {**empty_checkpoint(), "channel_values": {"m": [message]}, "channel_versions": {"m": "1"}}
                config = {"configurable": {"thread_id": "shared", "checkpoint_ns": who}}
                saver.put(config, checkpoint, {"source": "loop", "step": number}, {"m": "1"})
            if number % 3 == 2:
                saver.prune(["shared"])
            if number % 4 == 3:
                saver.delete_thread("shared")
            saver.put(config, checkpoint, {"source": "loop", "step": number}, {"m": "1"})
"""


def test_savers_in_two_processes_drop_nothing_of_one_another(place: Any) -> None:
    model = place.model()
    points = [point_of(model.invoke([HumanMessage(f"{LONG}{number}")])) for number in range(4)]
    place.close()
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(place.folder), who, *some], env=dict(os.environ))
        for who, some in (("a", points[:3]), ("b", points[1:]))
    ]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    with thaw.open(place.folder) as repo:
        tags = {tag.target for tag in repo.tags()}
        with ThawSaver(repo) as saver:
            named = {one for found in saver.list(None) for one in points_in(found.checkpoint["channel_values"])}
        assert named and tags == named == {tag.target for tag in repo.tags()}


class Fan(MessagesState):
    question: str


def test_an_async_fan_out_loads_its_point_once_and_keeps_all_of_it(place: Any) -> None:
    read = place.model().invoke([HumanMessage(LONG)])
    place.reopen()
    model, saver = place.model(), place.saver()

    async def answer(state: Fan) -> dict[str, Any]:
        return {"messages": [await model.ainvoke([*state["messages"], HumanMessage(state["question"])])]}

    graph = StateGraph(Fan)
    graph.add_node("answer", answer)
    graph.add_conditional_edges(
        START, lambda state: [Send("answer", {"messages": state["messages"], "question": f"{n}?"}) for n in range(6)]
    )
    runs = graph.compile(checkpointer=saver)
    done = asyncio.run(runs.ainvoke({"messages": [HumanMessage(LONG), read]}, THREAD))["messages"][2:]
    assert sorted(record(one)["source"] for one in done) == ["live"] * 5 + ["stored"]
    assert {record(one)["parent"] for one in done} == {point_of(read)}
    assert {tag.target for tag in place.repo.tags()} == {point_of(one) for one in [read, *done]}


def test_a_repository_is_opened_by_its_path(tmp_path: Path) -> None:
    with ThawSaver(tmp_path / "runs") as saver:
        assert saver.repo.path == tmp_path / "runs" and list(saver.list(None)) == []
