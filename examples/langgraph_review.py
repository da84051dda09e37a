"""A review in LangGraph: read a document once, let four reviewers continue from there, adopt the best review.

    python examples/langgraph_review.py read path/to/model document.txt     # stops behind the reading
    python examples/langgraph_review.py review path/to/model                # tomorrow, in another process

The graph's checkpoint names the point at which the document was read. So the four reviewers, which run side by side,
load that point once and prefill their questions alone. The winner is the review that the model finds likeliest: it goes
on as the thread, and becomes the branch `main`. After `prune` no checkpoint names the other three, and gc frees them.
"""

from __future__ import annotations

import operator
import sys
from pathlib import Path
from typing import Annotated, Any

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Overwrite, Send

import thaw
from thaw.integrations.langgraph import ChatThaw, ThawSaver, likeliest, point_of

FOLDER = "review"
THREAD = {"configurable": {"thread_id": "review"}}
REVIEWERS = {
    "safety": "What could go wrong here? Answer in one sentence.",
    "cost": "What is expensive here? Answer in one sentence.",
    "language": "Is the document well written? Answer in one sentence.",
    "gaps": "What does the document leave out? Answer in one sentence.",
}


class Review(MessagesState):
    """`reviews`: of each reviewer its question and its answer."""

    reviews: Annotated[list[tuple[HumanMessage, AIMessage]], operator.add]


class Asked(MessagesState):
    """What one reviewer is given: the conversation up to the reading, and its question."""

    question: str


def graph_of(model: ChatThaw, saver: ThawSaver) -> Any:
    """read → four × review → adopt; it stops before the reviews."""

    def read(state: Review) -> dict[str, list[AnyMessage]]:
        return {"messages": [model.invoke(state["messages"])]}

    def fan_out(state: Review) -> list[Send]:
        return [Send("review", {"messages": state["messages"], "question": text}) for text in REVIEWERS.values()]

    def review(state: Asked) -> dict[str, list[tuple[HumanMessage, AIMessage]]]:
        question = HumanMessage(state["question"])
        return {"reviews": [(question, model.invoke([*state["messages"], question]))]}

    def adopt(state: Review) -> dict[str, Any]:
        scores = likeliest(state["messages"], [answer for _, answer in state["reviews"]])
        return {"messages": list(state["reviews"][scores.index(max(scores))]), "reviews": Overwrite([])}

    graph = StateGraph(Review)
    graph.add_node("read", read)
    graph.add_node("wait", lambda state: {})
    graph.add_node("review", review)
    graph.add_node("adopt", adopt)
    graph.add_edge(START, "read")
    graph.add_edge("read", "wait")
    graph.add_conditional_edges("wait", fan_out, ["review"])
    graph.add_edge("review", "adopt")
    graph.add_edge("adopt", END)
    return graph.compile(checkpointer=saver, interrupt_before=["wait"])


def main(step: str, path: str, document: str | None = None) -> None:
    with (
        thaw.load_engine("transformers", model=path) as engine,
        thaw.open(FOLDER, engine=engine) as repo,
        ThawSaver(repo) as saver,
    ):
        model = ChatThaw(repo=repo, sampling=thaw.Sampling(max_tokens=32, temperature=0.7))
        graph = graph_of(model, saver)
        if step == "read":
            if document is None:
                raise SystemExit("read: which document?")
            text = f"{Path(document).read_text()}\n\nSum this up in one sentence."
            done = graph.invoke({"messages": [HumanMessage(text)]}, THREAD)
            show("read", done["messages"][-1])
            return
        for update in graph.stream(None, THREAD, stream_mode="updates"):
            for question, answer in update.get("review", {}).get("reviews", ()):
                show(next(name for name, text in REVIEWERS.items() if text == question.content), answer)
        point = point_of(graph.get_state(THREAD).values["messages"][-1])
        assert point is not None
        repo.adopt(point, "main")
        saver.prune([THREAD["configurable"]["thread_id"]])
        print(f"main is {point}")


def show(name: str, answer: AIMessage) -> None:
    said = answer.response_metadata["thaw"]
    tokens = f"{said['prefilled_tokens']} prefilled, {said['cached_tokens']} cached"
    print(f"{name:8s}  {tokens}, {said['source']}: {str(answer.content).strip()!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
