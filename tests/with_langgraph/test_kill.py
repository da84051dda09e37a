"""kill -9 between a checkpoint and its tag, on either side: no checkpoint ever names KV that gc may free."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import thaw
from thaw.integrations.langgraph import ChatThaw, ThawSaver
from thaw.integrations.langgraph.messages import points_in

WRITER = """
import os, signal, sys
import thaw
from langchain_core.messages import HumanMessage
from langgraph.graph import START, MessagesState, StateGraph
from thaw.integrations.langgraph import ChatThaw, ThawSaver, keeping

folder, where, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
engine = thaw.load_engine("fake")
repo = thaw.open(folder, engine=engine)
saver, model = ThawSaver(repo), ChatThaw(repo=repo, sampling=thaw.Sampling(max_tokens=4))
graph = StateGraph(MessagesState)
graph.add_node("answer", lambda state: {"messages": [model.invoke(state["messages"])]})
graph.add_edge(START, "answer")
runs = graph.compile(checkpointer=saver)
count = 0

def dying(name):
    done = getattr(keeping, name)
    def call(*args):
        global count
        points = list(args[2])
        count += bool(points)
        if count == number and where == f"before {name}":
            os.kill(os.getpid(), signal.SIGKILL)
        found = done(*args)
        if count == number and where == f"after {name}":
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    setattr(keeping, name, call)

def step(thread, text):
    runs.invoke({"messages": [HumanMessage(text)]}, {"configurable": {"thread_id": thread}})

for thread in ("a", "b"):
    step(thread, "hello " * 60)
dying(where.split()[1])
for number_of_step in range(3):
    for thread in ("a", "b"):
        step(thread, f"more {number_of_step}")
saver.delete_thread("b")
saver.copy_thread("a", "c")
saver.delete_thread("a")
"""


@pytest.mark.parametrize(
    ("where", "number"), [(f"{when} {what}", n) for what, n in (("hold", 3), ("release", 1), ("release", 2))
                          for when in ("before", "after")],
)  # fmt: skip
def test_no_checkpoint_names_freed_kv_after_a_kill(tmp_path: Path, where: str, number: int) -> None:
    folder = tmp_path / "runs"
    died = subprocess.run(
        [sys.executable, "-c", WRITER, str(folder), where, str(number)], env=dict(os.environ), timeout=120
    )
    assert died.returncode == -signal.SIGKILL
    with thaw.load_engine("fake") as engine, thaw.open(folder, engine=engine) as repo:
        repo.gc(keep_reflog_s=0)  # at once, before a saver has looked
        with ThawSaver(repo) as saver:
            named = check(saver, ChatThaw(repo=repo, live_sessions=0))
            assert named and {tag.target for tag in repo.tags()} == named  # and what the kill left behind is dropped
            repo.gc(keep_reflog_s=0)
            assert check(saver, ChatThaw(repo=repo, live_sessions=0)) == named


def check(saver: ThawSaver, model: ChatThaw) -> set[str]:
    """Every point that a checkpoint or a write names can be continued from; all of them."""
    named: set[str] = set()
    for one in saver.list(None):
        found: Any = (one.checkpoint["channel_values"], one.pending_writes)
        named |= points_in(found)
    for point in named:
        with saver.repo.session(point) as session:
            assert session.proof is not None and session.proof.hit
    return named
