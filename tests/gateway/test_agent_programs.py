"""Claude Code and Codex themselves, not interactive, with nothing of theirs changed; offline.

They are skipped, by name, where they are not installed. The model is the fake one, which says what it is told to: it
calls their tools. Whatever they send, the engine computes the tokens after the last common one and no others.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway_stand import TOKEN, Gateway, Start
from reciting import reciting, say
from thaw.core.prefix import common_prefix
from thaw.gateway.settings import GatewaySettings

INSTALL = "npm install -g @anthropic-ai/claude-code@2.1.197 @openai/codex@0.171.0"
QUIET = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1"}
CODEX = """
model = "fake"
model_provider = "thaw"
web_search = "disabled"
check_for_update_on_startup = false

[features]
plugins = false
apps = false

[analytics]
enabled = false

[model_providers.thaw]
name = "thaw"
base_url = "{url}/v1"
env_key = "THAW_SERVE_TOKEN"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
"""


@pytest.fixture
def gateway(start: Start) -> Iterator[Gateway]:
    """Tokens are bytes here, and these programs' instructions and tools have up to 80,000."""
    with reciting(max_model_len=400_000) as engine:
        yield start(engine=engine, settings=GatewaySettings(tools="hermes", reasoning="think"))


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder to work in, with what the model is to say once it has looked there."""
    folder = tmp_path / "desk"
    folder.mkdir()
    (folder / "next.txt").write_text(say("It says: 4711."))
    return folder


def tool(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def program(name: str, words: list[str], folder: Path, **variables: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed here: {INSTALL}")
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    env = {"PATH": os.environ["PATH"], "HOME": str(home), **variables}
    done = subprocess.run(
        [found, *words], cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def claude(gateway: Gateway, folder: Path, prompt: str, *words: str) -> dict[str, Any]:
    told = {"ANTHROPIC_BASE_URL": gateway.url, "ANTHROPIC_API_KEY": TOKEN, **QUIET}
    all_words = ["-p", prompt, "--model", "fake", "--output-format", "json", *words]
    found: dict[str, Any] = json.loads(program("claude", all_words, folder, **told))
    return found


def codex(gateway: Gateway, folder: Path, *words: str) -> list[dict[str, Any]]:
    home = folder.parent / "home" / ".codex"
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(CODEX.format(url=gateway.url))
    flags = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "--json"]
    told = program("codex", ["exec", *words, *flags], folder, CODEX_HOME=str(home), THAW_SERVE_TOKEN=TOKEN)
    return [json.loads(line) for line in told.splitlines() if line.startswith("{")]


def said(events: list[dict[str, Any]]) -> list[str]:
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    return [item["text"] for item in items if item["type"] == "agent_message"]


def check_computed(gateway: Gateway, num: int) -> None:
    """All requests together: each computed what follows the last token that an earlier one had, and its answer."""
    points = [point for _, _, point in gateway.service.ledger.points("")]
    assert len(points) == num
    seen: list[tuple[int, ...]] = []
    expected = 0
    for point in points:
        shown = gateway.repo.show(point)
        tokens, [*_, answer] = shown.tokens, shown.turns
        prompt = tokens[: answer.start]
        known = max((max(0, common_prefix(one, prompt) - 1) for one in seen), default=0)
        expected += len(prompt) - known + len(tokens) - answer.start - 1
        seen.append(tokens)
    assert gateway.num_forwarded == expected


@pytest.mark.slow("starts Claude Code, where it is installed")
def test_claude_code_calls_tools_goes_on_and_forks_with_nothing_read_twice(gateway: Gateway, desk: Path) -> None:
    look = say(tool("Read", file_path=str(desk / "next.txt")))
    first = claude(gateway, desk, f"Look. {look}")
    assert (first["result"], first["num_turns"]) == ("It says: 4711.", 2)
    more = claude(gateway, desk, f"More. {say('<think>Why?</think>Because.')}", "--continue")
    assert more["result"] == "Because." and more["session_id"] == first["session_id"]
    assert more["usage"]["cache_read_input_tokens"] > 50 * more["usage"]["input_tokens"]
    for answer in ("One way.", "Another."):
        fork = claude(gateway, desk, say(answer), "--resume", first["session_id"], "--fork-session")
        assert fork["result"] == answer and fork["session_id"] != first["session_id"]
    check_computed(gateway, num=5)


@pytest.mark.slow("starts Claude Code, where it is installed")
def test_claude_codes_subagents_share_what_they_have_in_common(gateway: Gateway, desk: Path) -> None:
    calls = [
        tool("Agent", description=name, prompt=f"{name}: {say(name)}", subagent_type="general-purpose")
        for name in ("left", "right")
    ]
    orders = "".join([*calls, tool("Read", file_path=str(desk / "next.txt"))])
    hidden = orders.replace("SAY[[", r"\u0053AY[[").replace("]]END", r"]]\u0045ND")  # as JSON spells it
    done = claude(gateway, desk, f"Ask two. {say(hidden)}")
    assert done["result"] == "It says: 4711."
    check_computed(gateway, num=4)


@pytest.mark.slow("starts Codex, where it is installed")
def test_codex_runs_commands_and_resumes_with_nothing_read_twice(gateway: Gateway, desk: Path) -> None:
    patch = "apply_patch <<X\n*** Begin Patch\n*** Add File: made.txt\n+made\n*** End Patch\nX"
    first = codex(
        gateway, desk, f"Do. {say(tool('exec_command', cmd=patch) + tool('exec_command', cmd='cat next.txt'))}"
    )
    assert said(first) == ["It says: 4711."] and (desk / "made.txt").read_text() == "made\n"
    more = codex(gateway, desk, "resume", "--last", f"More. {say('<think>Why?</think>Because.')}")
    assert said(more) == ["Because."]
    check_computed(gateway, num=3)
