"""Nodes for several answers to one conversation: N attempts as one batch, and one of them by any judge.

    graph.add_node("try", attempts(model, 4))          # state["attempts"]: four messages, each with its point
    graph.add_node("pick", pick(judge))                # the winner becomes a message
    graph.add_node("answer", best_of_n(model, 4))      # both; no checkpoint names what was not picked, and gc frees it

A judge is a function of the conversation and the attempts, and gives the winner's number or a score for each. It may be
async, and may ask a model. What a node adds to the state is plain messages.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda

from thaw.core.errors import InvalidRequest
from thaw.integrations.langgraph.chat_model import ChatThaw
from thaw.integrations.langgraph.messages import KEY

Verdict: TypeAlias = int | Sequence[float]
Judge: TypeAlias = Callable[[Sequence[BaseMessage], Sequence[AIMessage]], Verdict | Awaitable[Verdict]]
Node: TypeAlias = Runnable[Any, dict[str, Any]]


def likeliest(messages: Sequence[BaseMessage], attempts: Sequence[AIMessage]) -> list[float]:
    """The judge that asks nobody: the mean log probability of each attempt's tokens."""
    return [float(one.response_metadata[KEY]["mean_logprob"]) for one in attempts]


def attempts(model: ChatThaw, n: int, *, messages: str = "messages", key: str = "attempts", **sampling: Any) -> Node:
    """A node that answers `state[messages]` `n` times and sets `state[key]`. The messages are read once."""

    def run(state: Any, config: RunnableConfig) -> dict[str, Any]:
        return {key: model.attempts(_of(state, messages), n, callbacks=config.get("callbacks"), **sampling)}

    async def arun(state: Any, config: RunnableConfig) -> dict[str, Any]:
        return {key: await model.aattempts(_of(state, messages), n, callbacks=config.get("callbacks"), **sampling)}

    return RunnableLambda(run, arun, name="attempts")


def pick(judge: Judge = likeliest, *, messages: str = "messages", key: str = "attempts") -> Node:
    """A node that adds the winner of `state[key]` to `state[messages]`, and sets `state[key]` to nothing."""

    def run(state: Any) -> dict[str, Any]:
        return {messages: [_winner(judge, _of(state, messages), _of(state, key))], key: []}

    async def arun(state: Any) -> dict[str, Any]:
        return {messages: [await _awinner(judge, _of(state, messages), _of(state, key))], key: []}

    return RunnableLambda(run, arun, name="pick")


def best_of_n(
    model: ChatThaw, n: int, judge: Judge = likeliest, *, messages: str = "messages", **sampling: Any
) -> Node:
    """A node that answers `n` times and adds the winner to `state[messages]`; the others are not in the state."""
    tries = attempts(model, n, messages=messages, **sampling)

    def run(state: Any, config: RunnableConfig) -> dict[str, Any]:
        return {messages: [_winner(judge, _of(state, messages), tries.invoke(state, config)["attempts"])]}

    async def arun(state: Any, config: RunnableConfig) -> dict[str, Any]:
        made = (await tries.ainvoke(state, config))["attempts"]
        return {messages: [await _awinner(judge, _of(state, messages), made)]}

    return RunnableLambda(run, arun, name="best_of_n")


def _winner(judge: Judge, messages: Sequence[BaseMessage], made: Sequence[AIMessage]) -> AIMessage:
    verdict = judge(messages, made)
    if inspect.isawaitable(verdict):
        if inspect.iscoroutine(verdict):
            verdict.close()
        raise InvalidRequest("the judge is async: run the graph with ainvoke or astream")
    return _chosen(verdict, made)


async def _awinner(judge: Judge, messages: Sequence[BaseMessage], made: Sequence[AIMessage]) -> AIMessage:
    verdict = judge(messages, made)
    return _chosen(await verdict if inspect.isawaitable(verdict) else verdict, made)


def _chosen(verdict: Any, made: Sequence[AIMessage]) -> AIMessage:
    """Of equal scores the first. Raises `InvalidRequest` for a verdict that chooses none of `made`."""
    number = _number(verdict)
    if number is None:
        scores = _scores(verdict)
        if not made or len(scores) != len(made):
            raise InvalidRequest(f"the judge gave {len(scores)} scores for {len(made)} attempts; give one each")
        number = max(range(len(scores)), key=scores.__getitem__)
    if not 0 <= number < len(made):
        raise InvalidRequest(f"the judge chose number {number} of {len(made)} attempts; they are numbered from 0")
    winner: AIMessage = made[number]
    return winner


def _number(verdict: Any) -> int | None:
    """The winner's number, also where it is NumPy's or PyTorch's; None for scores."""
    try:
        return operator.index(verdict)
    except TypeError:
        return None


def _scores(verdict: Any) -> list[float]:
    try:
        scores = [float(one) for one in verdict]
    except (TypeError, ValueError):
        raise InvalidRequest(
            f"the judge gave {ascii(verdict)[:80]}; give the winner's number, or a score for each attempt"
        ) from None
    if any(map(math.isnan, scores)):
        raise InvalidRequest(f"the judge gave scores that are no numbers: {ascii(scores)[:80]}")
    return scores


def _of(state: Any, name: str) -> Any:
    """A field of a graph's state, which is a mapping or an object."""
    try:
        return state[name] if isinstance(state, Mapping) else getattr(state, name)
    except (KeyError, AttributeError):
        raise InvalidRequest(f"the graph's state has no {name!r}; tell the node its name") from None
