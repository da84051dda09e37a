"""On a real server, started in vLLM's own environment: structured output, and calls of tools as a model wrote them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.messages.utils import message_chunk_to_message
from pydantic import BaseModel, Field

import thaw
from langgraph_stand import record
from thaw import serve
from thaw.integrations.langgraph import ChatThaw, point_of
from thaw.repo import Repository

PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
pytestmark = [
    pytest.mark.slow("boots vLLM cold"),
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-vllm; `make .venv-vllm` creates it"),
]
TEMPLATE = """\
{%- if tools %}<|im_start|>system
Tools: {{ tools | tojson }}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", "arguments": \
{{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""SmolLM2's has no place for tools."""
CALL = r'<tool_call>\{"name": "look_up", "arguments": \{"path": "[a-z]{3,8}"\}\}</tool_call>'


class Verdict(BaseModel):
    """What a reviewer says."""

    good: bool
    score: int = Field(ge=0, le=9)


def look_up(path: str) -> str:
    """Read a file."""
    return path


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Iterator[Repository]:
    folder = tmp_path_factory.mktemp("real") / "runs"
    model = tmp_path_factory.mktemp("model")
    for file in demo_model.iterdir():
        (model / file.name).symlink_to(file)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    arguments = ("--max-model-len", "1024", "--enforce-eager")
    with thaw.open(folder, create=True) as bare:
        started = serve.up(bare, "vllm", str(model), python=str(PYTHON), arguments=arguments)
        try:
            with thaw.attach(started.record.url) as engine, thaw.open(folder, engine=engine) as opened:
                yield opened
        finally:
            serve.down(bare)


def test_structured_output_is_what_the_schema_says(repo: Repository) -> None:
    model = ChatThaw(repo=repo, sampling=thaw.Sampling(max_tokens=64, temperature=0))
    asked = [HumanMessage("Is a pump in a cellar a good idea? Answer as JSON with good and score.")]
    assert isinstance(model.with_structured_output(Verdict).invoke(asked), Verdict)
    raw = asyncio.run(model.with_structured_output(Verdict.model_json_schema(), include_raw=True).ainvoke(asked))
    assert raw["parsing_error"] is None and Verdict(**raw["parsed"])
    # The answer goes on like any other.
    follow = model.invoke([*asked, raw["raw"], HumanMessage("Why?")])
    assert record(follow)["parent"] == point_of(raw["raw"]) and record(follow)["prefilled_tokens"] < 30


def test_a_call_is_read_and_its_result_goes_on_from_it(repo: Repository) -> None:
    """The grammar makes a small model write a call; reading it is as ever."""
    model = ChatThaw(repo=repo, tool_calls="hermes", sampling=thaw.Sampling(max_tokens=64, temperature=0))
    tools = model.bind_tools([look_up])
    asked = [HumanMessage("Look into a file.")]
    called = tools.invoke(asked, structured_outputs={"regex": CALL})
    streamed = None
    for chunk in tools.stream(asked, structured_outputs={"regex": CALL}):
        streamed = chunk if streamed is None else streamed + chunk
    assert isinstance(called, AIMessage) and called.response_metadata["finish_reason"] == "tool_calls"
    for answer in (called, message_chunk_to_message(streamed)):
        (call,) = answer.tool_calls
        assert call["name"] == "look_up" and set(call["args"]) == {"path"} and answer.content == ""
        result = ToolMessage("nothing there", tool_call_id=call["id"])
        after = tools.invoke([*asked, answer, result])
        assert record(after)["parent"] == point_of(answer) and record(after)["source"] == "live"
