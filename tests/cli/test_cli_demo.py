"""The demo: two processes, a proof, a repository and a receipt to explore; and it says so when something failed."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from thaw.cli import story as telling
from thaw.demo import events as happened
from thaw.demo import run as demo
from thaw.receipt import verify

from .conftest import SOURCE, Shell


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shell, str]:
    """The demo with the fake engine, and what it printed."""
    shell = Shell(tmp_path_factory.mktemp("demo"))
    return shell, shell.ok("demo", "--engine", "fake").out


def test_it_proves_what_it_shows(told: tuple[Shell, str]) -> None:
    _, out = told
    assert out.count("held  ") == 6
    assert "FAILED" not in out
    assert re.search(r"\d × sooner", out)


def test_both_processes_are_others_and_their_own(told: tuple[Shell, str]) -> None:
    pids = re.findall(r"\(process (\d+)\)", told[1])
    assert len(set(pids)) == 2


def test_every_command_that_it_suggests_works(told: tuple[Shell, str]) -> None:
    shell, out = told
    suggested = re.findall(r"^ +(thaw .*?)(?:  .*)?$", out[out.index("What to run next") :], re.MULTILINE)
    assert len(suggested) == 8
    for line in suggested:
        if not line.endswith(" serve"):
            shell.ok(*shlex.split(line)[1:])


def test_the_tree_of_a_demo_is_served_to_the_key_that_is_printed(told: tuple[Shell, str]) -> None:
    """As a newcomer does it: whatever stands on the key's line after the colon is the key."""
    httpx = pytest.importorskip("httpx")
    for package in ("starlette", "uvicorn"):
        pytest.importorskip(package, reason="the extra [server] is not installed")
    shell, out = told
    (suggested,) = re.findall(r"^ +thaw (.* serve)(?:  .*)?$", out, re.MULTILINE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [*shlex.split(suggested), "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "THAW_SERVE_TOKEN"}
    served = subprocess.Popen(
        [sys.executable, "-m", "thaw.cli", *words], cwd=shell.cwd, text=True,
        env={**environment, "PYTHONPATH": str(SOURCE)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        assert served.stdout is not None
        printed = ""
        while "key for this run" not in printed:
            line = served.stdout.readline()
            assert line, printed
            printed += line
        (url,) = re.findall(r"in a browser: (\S+)$", printed, re.MULTILINE)
        (key,) = re.findall(r"^.*key for this run .*: (\S+)$", printed, re.MULTILINE)
        with httpx.Client(transport=httpx.HTTPTransport(retries=40), timeout=60) as browser:
            page = browser.post(f"{url}tree/login", data={"key": key}, follow_redirects=True)
        assert page.status_code == 200 and "answer/0" in page.text
    finally:
        served.terminate()
        served.communicate(timeout=60)


def test_its_receipt_adds_up_and_its_repository_is_whole(told: tuple[Shell, str]) -> None:
    shell, _ = told
    checked = verify(shell.cwd / "thaw-demo" / "receipt.json")
    assert checked.ok, checked.problems
    assert checked.receipt.kind == "demo"
    assert checked.receipt.ok
    assert str(shell.cwd) not in (shell.cwd / "thaw-demo" / "receipt.json").read_text()
    shell.ok("-C", "thaw-demo", "fsck")


@pytest.mark.slow("tells the whole story three times")
def test_running_it_again_takes_another_folder_or_replaces_a_demo_alone(shell: Shell) -> None:
    for folder in ("thaw-demo", "thaw-demo-2"):
        assert shell.ok("demo", "--engine", "fake", "--json").json()["folder"] == folder
    assert shell.ok("demo", "--engine", "fake", "--force", "--json").json()["folder"] == "thaw-demo"
    taken = shell("demo", "--engine", "fake", "--out", "thaw-demo")
    assert taken.code == 4
    assert "--force" in taken.err
    (shell.cwd / "mine").mkdir()
    (shell.cwd / "mine" / "thesis.txt").write_text("keep me")
    assert shell("demo", "--engine", "fake", "--out", "mine", "--force").code == 4
    assert (shell.cwd / "mine" / "thesis.txt").read_text() == "keep me"


def test_json_is_the_whole_story(shell: Shell) -> None:
    said = shell.ok("demo", "--engine", "fake", "--out", "d", "--max-tokens", "5", "--json").json()
    assert said["ok"] is True
    assert len(said["children"]) == 4
    assert all(child["num_prefilled_tokens"] == child["num_suffix_tokens"] for child in said["children"])
    assert said["parent"]["logprobs"] == said["resumed"]["logprobs"]


@pytest.mark.slow("imports torch in a process of its own")
def test_an_error_in_a_process_keeps_its_kind(shell: Shell) -> None:
    failed = shell("demo", "--model", "/nonexistent/model", "--json", THAW_MODEL="")
    assert failed.code == 2
    assert failed.json()["error"]["kind"] == "not-found"


def test_what_failed_is_said_and_nothing_is_claimed(
    told: tuple[Shell, str], capsys: pytest.CaptureFixture[str]
) -> None:
    story = _story(told[0].cwd)
    narrator = telling.Narrator()
    telling.proof(narrator, story)
    telling.ending(narrator, story)
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "did NOT keep its guarantees" in out
    assert "sooner" not in out
    assert "What to run next" not in out


def _story(folder: Path) -> demo.Story:
    """A story in which the resumed parent said something else, as the real checks see it."""
    shell = Shell(folder)
    plain = shell.ok("demo", "--engine", "fake", "--out", "again", "--force", "--json").json()
    plain["resumed"]["logprobs"][3] += 1e-12
    for key in ("ok", "sooner", "checks"):
        del plain[key]
    events = {name: msgspec.convert(plain[name], kind) for name, kind in EVENTS.items()}
    children = msgspec.convert(plain["children"], tuple[happened.ChildAnswered, ...])
    checks = tuple(demo.checks(events["committed"], events["hydrated"], children, events["parent"], events["resumed"]))
    assert [check.held for check in checks] == [True] * 5 + [False]
    return demo.Story(folder="d", receipt="r", children=children, checks=checks, **events)


EVENTS = {
    "loaded": happened.ModelLoaded, "described": happened.Described, "read": happened.DocumentRead,
    "committed": happened.Committed,
    "parent": happened.Answered, "hydrated": happened.ChildrenHydrated, "resumed": happened.Answered,
}  # fmt: skip


@pytest.mark.slow("tells the whole story three times")
@pytest.mark.parametrize(("without_kv", "held"), [(0, True), (1, True), (2, False)])
def test_an_engine_may_lack_the_kv_of_the_last_token_and_no_more(tmp_path: Path, without_kv: int, held: bool) -> None:
    """vLLM has none for a token that nothing followed yet; whatever lacks more did not find the whole document."""
    story = _story(tmp_path)
    num_kv = story.committed.num_tokens - without_kv
    children = tuple(
        msgspec.structs.replace(
            child, num_cached_tokens=num_kv, num_prefilled_tokens=child.num_suffix_tokens + without_kv
        )
        for child in story.children
    )
    hydrated = msgspec.structs.replace(story.hydrated, num_kv=num_kv)
    _, document, suffix, *_ = demo.checks(story.committed, hydrated, children, story.parent, story.parent)
    assert document.held is held and suffix.held
    assert ("the token before" in suffix.name) is bool(without_kv)


def test_with_the_real_model(shell: Shell, demo_model: Path) -> None:
    said = shell.ok("demo", "--model", str(demo_model), "--json").json()
    assert said["ok"] is True
    assert said["committed"]["num_tokens"] >= 3000
    assert said["hydrated"]["proof"]["verification"] == "disk-verified"
    assert said["sooner"] > 1


def test_a_command_that_is_not_on_the_path_is_put_there_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / ".venv" / "bin" / "thaw"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert telling._path_first(".venv/bin/thaw") == 'export PATH="$PWD/.venv/bin:$PATH"'
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin")
    assert telling._path_first(str(script)) is None
    assert telling._path_first("/somewhere/__main__.py") is None
