"""A coding agent's transcript, made by us: 30 turns with tools and subagents, over each API.

Every turn recomputes the tokens after the last common one and no others, by the engine's count: forks from any earlier
response, subagents side by side, and all of it again after gateway and engine were started anew.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gateway_stand import Gateway, Start
from thaw.core.prefix import common_prefix

openai = pytest.importorskip("openai")

from thaw.gateway.place import WORTH_LOADING  # noqa: E402

FILE = "def area(width, height):\n    return width * height\n" * 6
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": about, "parameters": {"type": "object", "properties": {"path": {}}}},
    }
    for name, about in (("read", "Read a file."), ("edit", "Change a file."), ("task", "Ask a subagent."))
]


class Agent:
    """What a stateless client sends, and what the engine must have computed for it."""

    def __init__(self, gateway: Gateway, seen: list[tuple[int, ...]], tools: list[dict[str, Any]] = TOOLS) -> None:
        self.gateway, self.seen, self.tools = gateway, seen, tools
        self.client = gateway.openai()

    def ask(self, history: list[dict[str, Any]], shuffled: random.Random | None = None) -> Any:
        """A turn, checked by the engine's own tokens: those of the new session, and of all before."""
        tools = list(self.tools)
        if shuffled is not None:
            shuffled.shuffle(tools)
        before = self.gateway.num_forwarded
        reply = self.client.chat.completions.create(
            model="fake", messages=history, tools=tools, max_tokens=10, extra_body={"logit_bias": ASCII}
        )
        ran = self.gateway.num_forwarded - before
        self.check(reply, ran)
        return reply

    @staticmethod
    def known(one: tuple[int, ...], prompt: tuple[int, ...]) -> int:
        """Of `prompt`, from a session with these tokens. The last token of a session has no KV yet, and whoever goes on
        from inside one runs the last common token again."""
        return max(0, common_prefix(one, prompt) - 1)

    def check(self, reply: Any, ran: int | None = None) -> None:
        tokens = self.gateway.repo.show(reply.thaw["point"]).tokens
        prompt = tokens[: reply.usage.prompt_tokens]
        known = max((self.known(one, prompt) for one in self.seen), default=0)
        if reply.thaw["source"] == "new" and known < WORTH_LOADING:
            known = 0
        assert reply.thaw["cached_tokens"] == known
        assert reply.thaw["prefilled_tokens"] == len(prompt) - known
        if ran is not None:
            assert ran == len(prompt) - known + reply.usage.completion_tokens - 1
        self.seen.append(tokens)


ASCII = {str(token): -100 for token in range(128, 256)}
"""Answers that the tokenizer spells as they were sampled: then the last common token is that of the text, too."""


def answer(reply: Any, number: int) -> dict[str, Any]:
    """The answer as such clients send it back: text, and now and then a call."""
    return {"role": "assistant", "content": reply.choices[0].message.content}


def called(number: int) -> list[dict[str, Any]]:
    id = f"call_{number}"
    function = {"name": "read", "arguments": f'{{"path": "file{number}.py"}}'}
    return [
        {"role": "assistant", "tool_calls": [{"id": id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": id, "content": f"# {number}\n{FILE}"},
    ]


@pytest.mark.parametrize("engines", [1, 2])
def test_thirty_turns_with_tools_and_subagents_read_nothing_twice(start: Start, engines: int) -> None:
    """With two engines the gateway, both engines and all that was open are started anew half way."""
    random_order = random.Random(1)
    gateway = start(engines=engines)
    agent = Agent(gateway, [])
    history: list[dict[str, Any]] = [{"role": "system", "content": "You are a coding agent. " * 20}]
    ends: list[list[dict[str, Any]]] = []
    for turn in range(30):
        if turn == 15:
            gateway.close()
            gateway = start(engines=engines)
            agent = Agent(gateway, agent.seen)
        history += called(turn) if turn % 3 == 1 else [{"role": "user", "content": f"Step {turn}: {FILE[:80]}"}]
        reply = agent.ask(history, random_order)
        history.append(answer(reply, turn))
        ends.append(list(history))
        if turn % 10 == 5:
            _subagents(agent, history)
    for end in (ends[3], ends[11], ends[20], ends[28]):
        agent.ask([*end, {"role": "user", "content": "Try another way."}])


def _subagents(agent: Agent, history: list[dict[str, Any]]) -> None:
    """Four that share the conversation so far, at once."""

    def one(i: int) -> Any:
        messages = [*history, {"role": "user", "content": f"You are subagent {i}."}]
        return agent.client.chat.completions.create(
            model="fake", messages=messages, tools=TOOLS, max_tokens=10, extra_body={"logit_bias": ASCII}
        )

    before = agent.gateway.num_forwarded
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(one, range(4)))
    shared = len(agent.seen[-1]) - 1
    assert all(reply.thaw["cached_tokens"] >= shared for reply in replies)
    assert agent.gateway.num_forwarded - before == sum(reply.thaw["prefilled_tokens"] + 9 for reply in replies)
    agent.seen += [agent.gateway.repo.show(reply.thaw["point"]).tokens for reply in replies]


@pytest.mark.parametrize("engines", [1, 2])
def test_the_same_by_previous_response(start: Start, engines: int) -> None:
    gateway = start(engines=engines)
    client = gateway.openai()
    ids: list[tuple[str, int]] = []
    last: Any = None
    for turn in range(30):
        if turn == 15:
            gateway.close()
            gateway = start(engines=engines)
            client = gateway.openai()
        item: Any = {"role": "user", "content": f"Step {turn}: {FILE[:80]}"}
        if turn % 3 == 1:
            item = {"type": "function_call_output", "call_id": f"call_{turn}", "output": f"# {turn}\n{FILE}"}
        before = gateway.num_forwarded
        last = client.responses.create(
            model="fake", input=[item], max_output_tokens=10,
            tools=[{"type": "function", **tool["function"]} for tool in TOOLS],  # type: ignore[dict-item]
            previous_response_id=ids[-1][0] if ids else None,
        )  # fmt: skip
        known = ids[-1][1] - 1 if ids else 0
        assert last.thaw["cached_tokens"] == known
        assert gateway.num_forwarded - before == last.usage.input_tokens - known + 9
        ids.append((last.id, last.usage.total_tokens))
    for turn in (28, 16, 15, 14, 2, 0):
        kid = client.responses.create(
            model="fake", input="Another way.", max_output_tokens=10, previous_response_id=ids[turn][0],
            tools=[{"type": "function", **tool["function"]} for tool in TOOLS],  # type: ignore[dict-item]
        )  # fmt: skip
        assert kid.thaw["cached_tokens"] == ids[turn][1] - 1


def test_two_agents_side_by_side_read_nothing_twice_though_an_engine_dies(start: Start) -> None:
    """Each has an engine of its own, until one is left, which loads what the other one stored."""
    gateway = start(engines=2)
    seen: list[tuple[int, ...]] = []
    agents = [Agent(gateway, seen), Agent(gateway, seen, [])]
    histories: list[list[dict[str, Any]]] = [
        [{"role": "system", "content": f"{who} You are a coding agent. " * 20}] for who in "AB"
    ]
    homes: list[set[int]] = [set(), set()]
    for turn in range(12):
        if turn == 6:
            gateway.engines[min(homes[0])].close()
        for agent, history, home in zip(agents, histories, homes, strict=True):
            history += called(turn) if turn % 3 == 1 else [{"role": "user", "content": f"Step {turn}: {FILE[:80]}"}]
            reply = agent.ask(history)
            home.add(reply.thaw["engine"])
            history.append(answer(reply, turn))
        if turn == 5:
            assert sorted(map(tuple, homes)) == [(0,), (1,)]
    assert len(homes[0]) == 2 and len(homes[1]) == 1
