"""What coding agents send beside messages: accepted and named where it changes nothing, refused by name otherwise."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from gateway_stand import TOKEN, Gateway, Start
from reciting import reciting, say
from thaw.gateway.settings import GatewaySettings

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
PATCH = "*** Begin Patch\n*** End Patch"


@pytest.fixture
def speaking(start: Start) -> Iterator[Callable[..., Gateway]]:
    engines = []

    def begin(**options: Any) -> Gateway:
        engines.append(reciting(**options))
        return start(engine=engines[-1], settings=GatewaySettings(tools="hermes", reasoning="think"))

    yield begin
    for engine in engines:
        engine.close()


def post(gateway: Gateway, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    told = {"authorization": f"Bearer {TOKEN}", **headers}
    return httpx.post(f"{gateway.url}/v1/{path}", json=body, headers=told, timeout=60)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


# -- Messages, as Claude Code sends them

CLAUDE: dict[str, Any] = {
    "model": "fake", "max_tokens": 60, "metadata": {"user_id": "user_x_session_y"},
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=a1b2c;"},
        {"type": "text", "text": "You are a coding agent.", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
    ],
    "thinking": {"type": "adaptive", "display": "omitted"},
    "output_config": {"effort": "high"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "tools": [
        {"name": "Read", "description": "Read a file.", "input_schema": {"type": "object"}, "strict": True,
         "eager_input_streaming": True, "cache_control": {"type": "ephemeral"}},
        {"name": "mcp__db__query", "input_schema": {"type": "object"}, "defer_loading": True},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Look.", "cache_control": {"type": "ephemeral"}}]},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": say("ok")},
    ],
}  # fmt: skip


def test_claude_codes_request_is_answered_and_says_what_it_ignored(speaking: Callable[..., Gateway]) -> None:
    gateway = speaking()
    reply = post(gateway, "messages?beta=true", CLAUDE, **{"anthropic-beta": "context-management-2025-06-27"})
    assert reply.status_code == 200, reply.text
    assert reply.json()["content"] == [{"type": "text", "text": "ok"}]
    assert reply.headers["x-thaw-ignored"].split(",") == [
        "metadata", "context_management.clear_thinking_20251015", "tools.cache_control",
        "tools.eager_input_streaming", "tools.strict", "thinking.display",
    ]  # fmt: skip
    counted = {name: CLAUDE[name] for name in CLAUDE if name not in ("max_tokens", "metadata")}
    usage = reply.json()["usage"]
    told = post(gateway, "messages/count_tokens", counted).json()["input_tokens"]
    assert told == usage["input_tokens"] + usage["cache_read_input_tokens"]


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("context_management", {"edits": [{"type": "clear_tool_uses_20250919"}]}, "context_management.edits[0]"),
        ("context_management", {"edits": [{"type": "compact_20260112"}]}, "context_management.edits[0]"),
        ("output_config", {"task_budget": {"type": "tokens", "total": 1}}, "task_budget"),
        ("output_config", {"format": {"type": "json_schema", "schema": {}}}, "output_config.format"),
        ("tools", [{"type": "web_search_20250305", "name": "web_search", "max_uses": 8}], "tools[0]: a tool of type"),
        ("tools", [{"name": "x", "input_schema": {}, "novel": 1}], "tools[0].novel"),
        ("thinking", {"type": "enabled", "novel": 1}, "thinking.novel"),
        ("container", "c", "container"),
    ],
)
def test_what_could_change_the_answer_is_refused_by_name(
    speaking: Callable[..., Gateway], field: str, value: Any, named: str
) -> None:
    refused = post(speaking(), "messages", {**CLAUDE, field: value})
    assert refused.status_code == 400 and named in refused.json()["error"]["message"], refused.text


def test_effort_and_thinking_reach_the_template(speaking: Callable[..., Gateway]) -> None:
    """The fake template prints its variables."""
    gateway = speaking()
    first = post(gateway, "messages", CLAUDE).json()["thaw"]["point"]
    low = post(gateway, "messages", {**CLAUDE, "output_config": {"effort": "low"}, "thinking": {"type": "disabled"}})
    texts = [gateway.repo.show(point).text for point in (first, low.json()["thaw"]["point"])]
    assert '"reasoning_effort": "high", "enable_thinking": true' in texts[0]
    assert '"reasoning_effort": "low", "enable_thinking": false' in texts[1]


def test_a_deferred_tool_is_shown_where_it_is_referred_to(speaking: Callable[..., Gateway]) -> None:
    """The prompt before it stays as it was."""
    gateway = speaking()
    first = post(gateway, "messages", CLAUDE).json()
    searched = {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {}}
    found = {"type": "tool_reference", "tool_name": "mcp__db__query"}
    history = [
        *CLAUDE["messages"], {"role": "assistant", "content": [{"type": "text", "text": "ok"}, searched]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": [found]}]},
    ]  # fmt: skip
    second = post(gateway, "messages", {**CLAUDE, "messages": history, "max_tokens": 4}).json()
    assert second["usage"]["cache_read_input_tokens"] >= first["usage"]["input_tokens"] - 1
    text = gateway.repo.show(second["thaw"]["point"]).text
    assert "mcp__db__query" not in gateway.repo.show(first["thaw"]["point"]).text and "mcp__db__query" in text
    unknown = [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "tool_reference", "tool_name": "no"}]}]
    refused = post(gateway, "messages", {**CLAUDE, "messages": [{"role": "user", "content": unknown}]})
    assert refused.status_code == 400 and "'no'" in refused.text


# -- Responses, as Codex sends them

CODEX: dict[str, Any] = {
    "model": "fake", "instructions": "You are a coding agent.", "store": False, "stream": True, "tool_choice": "auto",
    "parallel_tool_calls": True, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "0199",
    "client_metadata": {"x-codex-installation-id": "1"}, "reasoning": {"effort": "medium", "summary": "auto"},
    "text": {"verbosity": "low"},
    "tools": [
        {"type": "function", "name": "exec_command", "description": "Run.", "strict": False,
         "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}}},
        {"type": "custom", "name": "apply_patch", "description": "Edit files.",
         "format": {"type": "grammar", "syntax": "lark", "definition": "start: begin_patch hunk+ end_patch"}},
        {"type": "local_shell"},
        {"type": "namespace", "name": "db", "description": "A database.",
         "tools": [{"type": "function", "name": "query", "parameters": {"type": "object"}}]},
    ],
}  # fmt: skip
CALLS = (
    call("exec_command", cmd="ls") + call("apply_patch", input=PATCH)
    + call("local_shell", command=["ls", "-l"], working_directory="/") + call("db__query", sql="select 1")
)  # fmt: skip


def codex(gateway: Gateway, input: list[dict[str, Any]], **more: Any) -> list[Any]:
    """Its stream's events, by the stock client."""
    client = gateway.openai()
    fields = {**CODEX, **more}
    extra = {name: fields.pop(name) for name in ("client_metadata",)}
    return list(client.responses.create(input=input, extra_body=extra, **fields))


def test_codexs_tools_are_called_in_their_own_items(speaking: Callable[..., Gateway]) -> None:
    gateway = speaking()
    events = codex(gateway, [{"type": "message", "role": "user", "content": say(CALLS)}])
    items = events[-1].response.output
    assert [one.type for one in items] == ["function_call", "custom_tool_call", "local_shell_call", "function_call"]
    assert (items[0].name, json.loads(items[0].arguments)) == ("exec_command", {"cmd": "ls"})
    assert (items[1].name, items[1].input) == ("apply_patch", PATCH)
    assert items[2].action.command == ["ls", "-l"] and items[2].action.working_directory == "/"
    assert (items[3].name, items[3].namespace) == ("query", "db")
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [one.id for one in done] == [one.id for one in items]
    inputs = [event for event in events if event.type == "response.custom_tool_call_input.done"]
    assert [event.input for event in inputs] == [PATCH]
    assert all(one.call_id for one in items)


def test_codexs_history_goes_back_and_only_what_is_new_is_read(speaking: Callable[..., Gateway]) -> None:
    gateway = speaking()
    user = {"type": "message", "role": "user", "content": say(CALLS)}
    first = codex(gateway, [user])[-1].response
    back = [one.model_dump(exclude_none=True) for one in first.output]
    outputs = [
        {"type": "function_call_output", "call_id": back[0]["call_id"], "output": "a.py"},
        {"type": "custom_tool_call_output", "call_id": back[1]["call_id"], "output": "Done!"},
        {"type": "function_call_output", "call_id": back[2]["call_id"], "output": "total 0"},
        {"type": "function_call_output", "call_id": back[3]["call_id"],
         "output": [{"type": "input_text", "text": "1"}]},
    ]  # fmt: skip
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}
    second = codex(gateway, [user, thought, *back, *outputs], max_output_tokens=4)[-1].response
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens - 1
    text = gateway.repo.show(second.thaw["point"]).text
    assert "total 0" in text and "Begin Patch" in text and '"working_directory": "/"' in text.replace("\\", "")


def test_codexs_request_says_what_it_ignored(speaking: Callable[..., Gateway]) -> None:
    gateway = speaking()
    user = {"type": "message", "role": "user", "content": say("ok")}
    reply = post(gateway, "responses", {**CODEX, "input": [user], "stream": False})
    assert reply.status_code == 200, reply.text
    assert set(reply.headers["x-thaw-ignored"].split(",")) == {
        "client_metadata", "prompt_cache_key", "reasoning.summary", "include.reasoning.encrypted_content",
        "text.verbosity", "tools.format",
    }  # fmt: skip
    with pytest.raises(openai.NotFoundError):
        gateway.openai().responses.retrieve(reply.json()["id"])


@pytest.mark.parametrize("kind", ["web_search", "image_generation", "tool_search", "mcp", "file_search"])
def test_a_tool_that_would_run_here_is_refused_by_name(speaking: Callable[..., Gateway], kind: str) -> None:
    gateway = speaking()
    with pytest.raises(openai.BadRequestError, match=f"{kind}.*turn it off") as refused:
        codex(gateway, [{"role": "user", "content": "x"}], tools=[{"type": kind}])
    assert refused.value.param == "tools[0]"


# -- retries


def test_a_retry_with_its_key_gets_the_same_response(speaking: Callable[..., Gateway]) -> None:
    gateway = speaking()
    body = {"model": "fake", "input": "hello", "max_output_tokens": 8}
    before = gateway.num_forwarded
    first = post(gateway, "responses", body, **{"idempotency-key": "k1"})
    ran = gateway.num_forwarded - before
    again = post(gateway, "responses", body, **{"idempotency-key": "k1"})
    assert again.json() == first.json() and gateway.num_forwarded - before == ran
    assert post(gateway, "responses", body, **{"idempotency-key": "k2"}).json()["id"] != first.json()["id"]
    other = post(gateway, "responses", {**body, "input": "x"}, **{"idempotency-key": "k1"})
    assert other.status_code == 422 and other.json()["error"]["code"] == "idempotency_key_reused"
    refused = {"model": "fake", "input": "", "novel": 1}
    assert post(gateway, "responses", refused, **{"idempotency-key": "k3"}).status_code == 400
    assert post(gateway, "responses", body, **{"idempotency-key": "k3"}).status_code == 200


def test_a_stream_that_broke_is_told_again_from_its_beginning(speaking: Callable[..., Gateway]) -> None:
    gateway = speaking(step_s=0.005)
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, "stream": True}
    headers = {"authorization": f"Bearer {TOKEN}", "idempotency-key": "k"}
    with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as broken:
        seen = next(broken.iter_bytes())
    whole = [b"", b""]

    def read(i: int) -> None:
        whole[i] = post(gateway, "chat/completions", body, **{"idempotency-key": "k"}).content

    threads = [threading.Thread(target=read, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert whole[0] == whole[1] and whole[0].startswith(seen) and whole[0].rstrip().endswith(b"[DONE]")
    assert gateway.num_forwarded == len("user\nhi" + "assistant\n") + 3 + 59  # and the marks of messages


@pytest.mark.parametrize("endpoint", ["chat/completions", "completions", "messages", "responses"])
def test_a_stream_that_ended_with_an_error_is_no_answer_to_a_retry(start: Start, endpoint: str) -> None:
    """Its branch moved meanwhile. The retry runs, and is kept once it has ended well."""
    gateway = start(step_s=0.005)
    said: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
    said = {"responses": {"input": "hi"}, "completions": {"prompt": "hi"}}.get(endpoint, said)
    other = {"model": "fake", "prompt": "x", "max_tokens": 1, "thaw": {"branch": "other"}}
    assert post(gateway, "completions", other).status_code == 200
    limit = "max_output_tokens" if endpoint == "responses" else "max_tokens"
    body = {"model": "fake", **said, limit: 100, "stream": True, "thaw": {"branch": "main"}}
    key = {"idempotency-key": "k"}
    headers = {"authorization": f"Bearer {TOKEN}", **key}
    with httpx.stream("POST", f"{gateway.url}/v1/{endpoint}", json=body, headers=headers) as stream:
        parts = stream.iter_bytes()
        first = next(parts)
        gateway.repo.branch("main", "other")
        assert b"somebody else moved it" in first + b"".join(parts)
    gateway.repo.delete_branch("main")
    again = [post(gateway, endpoint, body, **key).content for _ in range(2)]
    assert again[0] == again[1] and b"somebody else" not in again[0]


def test_a_parked_stream_is_not_begun_again_by_a_retry(start: Start) -> None:
    """Nor does another body take its key."""
    gateway = start(step_s=0.005)
    headers = {"authorization": f"Bearer {TOKEN}", "idempotency-key": "k"}
    body = {"model": "fake", "input": "hi", "max_output_tokens": 100, "stream": True}
    url, drain = f"{gateway.url}/v1/responses", f"{gateway.url}/admin/drain"
    with httpx.stream("POST", url, json=body, headers=headers) as stream:
        parts = stream.iter_bytes()
        told = next(parts)
        assert httpx.post(drain, headers=headers).json()["complete"]
        told += b"".join(parts)
    assert b"response.completed" not in told
    assert httpx.delete(drain, headers=headers).json()["resumed"] == 1
    assert httpx.post(url, json=body | {"input": "ho"}, headers=headers).status_code == 422
    again = httpx.post(url, json=body, headers=headers).content
    assert again == told and len(gateway.service.jobs) <= 1


def test_anothers_key_is_not_mine(start: Start) -> None:
    import hashlib

    from thaw.gateway.tenants import Quota, Tenant, Tenants

    keys = {hashlib.sha256(name.encode()).digest(): Tenant(name, Quota()) for name in ("acme", "beta")}
    gateway = start(tenants=Tenants(keys))
    body = {"model": "fake", "input": "hello", "max_output_tokens": 4}
    ids = {
        post(gateway, "responses", body, **{"idempotency-key": "k", "authorization": f"Bearer {name}"}).json()["id"]
        for name in ("acme", "beta")
    }
    assert len(ids) == 2
