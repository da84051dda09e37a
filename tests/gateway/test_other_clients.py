"""Clients of other makers, unchanged; skipped by name where they are not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest

from gateway_stand import TOKEN, Gateway

LONG = "a long story about a river, and who lives there. " * 8
SCRIPT = """
const OpenAI = require("openai").default;
const [, url, token, text] = process.argv;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: token, maxRetries: 0 });
(async () => {
  const first = await client.responses.create({ model: "fake", input: text, max_output_tokens: 8 });
  let told = "", last;
  const stream = await client.responses.create(
    { model: "fake", input: "Go on.", previous_response_id: first.id, max_output_tokens: 8, stream: true });
  for await (const event of stream) {
    if (event.type === "response.output_text.delta") told += event.delta;
    last = event;
  }
  const history = [{ role: "user", content: text }];
  const one = await client.chat.completions.create({ model: "fake", messages: history, max_tokens: 8 });
  history.push(one.choices[0].message, { role: "user", content: "Go on." });
  const two = await client.chat.completions.create({ model: "fake", messages: history, max_tokens: 8 });
  let refused;
  try { await client.responses.create({ model: "fake", input: "x", truncation: "auto" }); }
  catch (error) { refused = [error.status, error.param, error.constructor.name]; }
  console.log(JSON.stringify({ first, told, last, one, two, refused }));
})();
"""


def test_openai_of_npm(gateway: Gateway) -> None:
    node = shutil.which("node")
    if node is None or subprocess.run([node, "-e", 'require("openai")'], capture_output=True).returncode:
        pytest.skip("node has no openai package here: npm install openai, and NODE_PATH=…/node_modules")
    done = subprocess.run(
        [node, "-e", SCRIPT, gateway.url, TOKEN, LONG], capture_output=True, text=True, timeout=60, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    response = told["last"]["response"]
    assert told["told"] == response["output"][0]["content"][0]["text"]
    assert response["usage"]["input_tokens_details"]["cached_tokens"] == told["first"]["usage"]["total_tokens"] - 1
    one, two = told["one"]["usage"], told["two"]["usage"]
    assert two["prompt_tokens_details"]["cached_tokens"] == one["total_tokens"] - 1
    assert told["refused"] == [400, "truncation", "BadRequestError"]


def test_chat_openai_of_langchain(gateway: Gateway) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

    chat = langchain.ChatOpenAI(base_url=f"{gateway.url}/v1", api_key=TOKEN, model="fake", max_tokens=8, max_retries=0)
    history = [SystemMessage("You are brief."), HumanMessage(LONG)]
    first = chat.invoke(history)
    assert isinstance(first, AIMessage) and first.content
    second = chat.invoke([*history, first, HumanMessage("Go on.")])
    usage = second.usage_metadata
    assert usage["input_token_details"]["cache_read"] == first.usage_metadata["total_tokens"] - 1
    streamed = list(chat.stream([*history, first, HumanMessage("Once more.")], stream_usage=True))
    assert "".join(chunk.content for chunk in streamed)
    responses = langchain.ChatOpenAI(
        base_url=f"{gateway.url}/v1", api_key=TOKEN, model="fake", max_tokens=8, max_retries=0,
        use_responses_api=True, use_previous_response_id=True,
    )  # fmt: skip
    one = responses.invoke([HumanMessage(LONG)])
    two = responses.invoke([HumanMessage(LONG), one, HumanMessage("Go on.")])
    assert two.usage_metadata["input_token_details"]["cache_read"] == one.usage_metadata["total_tokens"] - 1
