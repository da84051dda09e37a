"""Graphs over the fake engine, whose count of forwarded tokens says what was prefilled."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langgraph.graph import START, MessagesState, StateGraph

import thaw
from thaw.engines.base import Engine
from thaw.integrations.langgraph import ChatThaw, ThawSaver, point_of
from thaw.repo import Repository

LONG = "a long story about a river, and who lives there. " * 12
THREAD = {"configurable": {"thread_id": "story"}}
ASCII = tuple((token, -100.0) for token in range(128, 256))
"""Biases of answers that the tokenizer spells as they were sampled."""
SAMPLING = thaw.Sampling(max_tokens=10, logit_bias=ASCII, ignore_eos=True)


class Place:
    """A repository with an engine, and what is opened over it. `reopen` is another process, as far as that is seen."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder, self.options = folder, options
        self._stack = ExitStack()
        self._open()

    def _open(self) -> None:
        self.engine: Engine = self._stack.enter_context(thaw.load_engine("fake", **self.options))
        self.repo: Repository = self._stack.enter_context(thaw.open(self.folder, engine=self.engine))

    def model(self, **options: Any) -> ChatThaw:
        return ChatThaw(repo=self.repo, **{"sampling": SAMPLING, **options})

    def saver(self) -> ThawSaver:
        return self._stack.enter_context(ThawSaver(self.repo))

    def reopen(self, **options: Any) -> None:
        self.close()
        self._stack, self.options = ExitStack(), {**self.options, **options}
        self._open()

    @property
    def num_forwarded(self) -> int:
        """Tokens that the engine has run through its model."""
        return int(self.engine._backend.num_forwarded_tokens)  # type: ignore[attr-defined]

    def gc(self) -> Any:
        """What no tag needs, with nothing kept for the reflog's sake."""
        return self.repo.gc(keep_reflog_s=0)

    def close(self) -> None:
        self._stack.close()


def graph_of(model: ChatThaw, saver: ThawSaver) -> Any:
    """A graph that answers what it is told, once an input."""
    graph = StateGraph(MessagesState)
    graph.add_node("answer", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_edge(START, "answer")
    return graph.compile(checkpointer=saver)


def ten_steps(graph: Any) -> None:
    for step in range(10):
        text = LONG if step == 0 else f"And then, {step}?"
        graph.invoke({"messages": [HumanMessage(text)]}, THREAD)


def after_step(graph: Any, step: int) -> Any:
    """The checkpoint with the answers of the first `step` steps, and nothing to do."""
    for found in graph.get_state_history(THREAD):
        messages = found.values.get("messages", [])
        if not found.next and sum(isinstance(one, AIMessage) for one in messages) == step:
            return found
    raise AssertionError(step)


def record(message: BaseMessage) -> dict[str, Any]:
    found: dict[str, Any] = message.response_metadata["thaw"]
    return found


def num_prefix(place: Place, message: BaseMessage) -> int:
    """Tokens of the commit at which a message ends."""
    return len(place.repo.show(point_of(message)).tokens)
