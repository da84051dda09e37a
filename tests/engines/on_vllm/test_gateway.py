"""The gateway before a stock vLLM: an agent's story through the stock clients, by the engine's own counts, and again
after the gateway and the engine were started anew."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from test_http import Server

import thaw

pytest.importorskip("vllm")
for package in ("starlette", "uvicorn", "openai", "anthropic"):
    pytest.importorskip(package)

from gateway_stand import TOKEN, Gateway  # noqa: E402
from thaw.gateway.settings import GatewaySettings  # noqa: E402
from thaw.gateway.tenants import single  # noqa: E402

LIMIT = 2048
LONG = "The river Elbe runs from the mountains to the sea, past old towns and wide meadows. " * 20


class Both:
    """Engine and gateway over one repository, started anew as often as wanted."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder, self._starts = model, folder, 0
        self._stack = ExitStack()

    def start(self) -> Gateway:
        self._stack.close()
        self._starts += 1
        server = Server(self._model, self._folder / f"server{self._starts}", "--max-model-len", str(LIMIT))
        self._stack.callback(server.stop)
        engine = self._stack.enter_context(thaw.attach(server.url))
        gateway = Gateway(self._folder / "runs", engine, single(TOKEN), GatewaySettings(models=("smol",)))
        self._stack.callback(gateway.close)
        return gateway

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def both(demo_model: Path, tmp_path: Path) -> Iterator[Both]:
    made = Both(demo_model, tmp_path)
    yield made
    made.close()


def cached(reply: Any) -> int:
    usage = reply.usage
    found = getattr(usage, "prompt_tokens_details", None) or usage.input_tokens_details
    return int(found.cached_tokens)


def test_a_story_of_turns_forks_and_restarts(both: Both) -> None:
    client = both.start().openai()
    history: list[dict[str, Any]] = [{"role": "system", "content": "You are brief."}]
    known = 0
    for turn in range(4):
        history.append({"role": "user", "content": f"{LONG if not turn else ''} Question {turn}?"})
        reply = client.chat.completions.create(model="smol", messages=history, max_tokens=12, temperature=0.7)
        assert cached(reply) == known
        known = reply.usage.total_tokens - 1
        history.append({"role": "assistant", "content": reply.choices[0].message.content})

    first = client.responses.create(model="smol", input=f"{LONG} Name it.", max_output_tokens=12)
    with ThreadPoolExecutor(4) as pool:
        kids = list(pool.map(lambda i: _fork(client, first.id, i), range(4)))
    assert {kid.thaw["parent"] for kid in kids} == {first.thaw["point"]}
    assert {cached(kid) for kid in kids} == {first.usage.total_tokens - 1}
    shape: dict[str, Any] = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": shape}}
    told = client.chat.completions.create(model="smol", messages=history, max_tokens=40, response_format=form)
    assert told.choices[0].message.content.lstrip().startswith("{")

    client = both.start().openai()
    again = _fork(client, first.id, 9)
    assert cached(again) == first.usage.total_tokens - 1 and again.thaw["parent"] == first.thaw["point"]
    assert client.responses.retrieve(kids[2].id).output_text == kids[2].output_text
    history.append({"role": "user", "content": "And now?"})
    on = client.chat.completions.create(model="smol", messages=history, max_tokens=12)
    assert cached(on) >= known and on.thaw["source"] == "stored"


def _fork(client: Any, id: str, number: int) -> Any:
    return client.responses.create(
        model="smol", input=f"Question {number}: why?", previous_response_id=id, max_output_tokens=8
    )
