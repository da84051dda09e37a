"""`thaw engine snapshot | show | restore`: an engine is stored while it works, and another process finishes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_engine_snapshot import working

import thaw
from thaw.cli.app import run
from thaw.engines.base import Engine
from thaw.repo import Repository
from thaw.snapshot import snapshot
from thaw.testing.laws.kit import until

TOKEN = "test-token"


def cli(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = run([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def worked(slow_engine: Engine, tmp_path: Path) -> tuple[Path, dict[str, list[int]]]:
    """A repository with a snapshot of three that ran and one that waited, and what they said in the end."""
    repo = thaw.open(tmp_path / "slow", engine=slow_engine)
    queue, _ = working(repo, 4, max_num_seqs=3)
    snapshot(repo, "engine", queue=queue)
    assert queue.wait(60)
    return repo.path, {one.id: list(one.result()) for one in queue.known()}


def test_a_snapshot_is_shown_and_restored(
    worked: tuple[Path, dict[str, list[int]]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, whole = worked
    code, shown = cli(capsys, "-C", str(path), "engine", "show")
    assert code == 0 and [one["was"] for one in shown["sessions"]] == ["running"] * 3 + ["waiting"]
    assert shown["restored"] is None and shown["sessions"][3]["request"]["num_prompt_left"] > 0
    code, told = cli(capsys, "-C", str(path), "engine", "restore", "--engine", "fake")
    assert code == 0 and told["recomputed_tokens"] == 0 and told["missed"] == []
    assert {one["id"]: one["token_ids"] for one in told["requests"]} == whole
    with thaw.open(path) as repo:
        assert {ref.name for ref in repo.branches()} == {"engine", *(f"engine/{i}" for i in range(4))}
        texts = [repo.show(f"engine/{i}").turns[-1].text for i in range(4)]
    assert texts == [one["text"] for one in told["requests"]]
    code, told = cli(capsys, "-C", str(path), "engine", "restore", "--engine", "fake")
    assert code == 4 and "was restored" in told["error"]["message"]
    code, told = cli(capsys, "-C", str(path), "engine", "restore", "--engine", "fake", "--fork")
    assert code == 0 and [one["branch"] for one in told["requests"]] == [f"engine-2/{i}" for i in range(4)]
    assert all(one["token_ids"] != whole[one["id"]] for one in told["requests"])


def test_as_text(worked: tuple[Path, dict[str, list[int]]], capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = worked
    assert run(["-C", str(path), "engine", "show"]) == 0
    assert "waiting" in (out := capsys.readouterr().out) and "request r3" in out
    assert run(["-C", str(path), "engine", "restore", "--engine", "fake"]) == 0
    assert "engine/3" in capsys.readouterr().out
    assert run(["-C", str(path), "engine", "show", "nothing"]) == 2


def test_a_stream_without_a_queue_goes_on_too(slow_engine: Engine, engine: Engine, tmp_path: Path) -> None:
    repo = thaw.open(tmp_path / "slow", engine=slow_engine)
    session = repo.session(seed=3)
    stream = session.stream("The river. ", thaw.Sampling(max_tokens=60, ignore_eos=True))
    next(iter(stream))
    snapshot(repo, "engine")
    whole = stream.result().token_ids
    there = thaw.open(repo.path, engine=engine)
    from thaw.snapshot import restore

    back = restore(there, "engine")
    (request,) = back.queue.known()
    assert request.result(60) == whole


def test_a_gateway_is_snapshotted_while_it_works(
    tmp_path: Path, slow_engine: Engine, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("starlette")
    from gateway_stand import Gateway
    from thaw.gateway.settings import GatewaySettings
    from thaw.gateway.tenants import single

    gateway = Gateway(tmp_path / "r", slow_engine, single(TOKEN), GatewaySettings())
    client = httpx.Client(base_url=gateway.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
    words = ("engine", "snapshot", gateway.url, "--api-key", TOKEN)
    assert cli(capsys, *words)[0] == 2  # nothing is open yet
    done = client.post("/v1/responses", json={"model": "fake", "input": "a river", "max_output_tokens": 4}).json()
    begun = client.post("/v1/responses", json={
        "model": "fake", "input": "another river", "max_output_tokens": 200, "background": True,
    }).json()  # fmt: skip
    until(lambda: any(len(job._pieces) > 3 for job in gateway.service.jobs.values()))
    code, told = cli(capsys, *words)
    assert code == 0 and told["snapshots"][0]["running"] == 1 and told["snapshots"][0]["missed"] == []
    assert told["snapshots"][0]["idle"] >= 1 and done["thaw"]["point"]
    code, again = cli(capsys, *words)
    assert code == 4 and "already" in again["error"]["message"]
    while (whole := client.get(f"/v1/responses/{begun['id']}").json())["status"] in ("queued", "in_progress"):
        time.sleep(0.01)
    gateway.close()
    code, back = cli(capsys, "-C", str(tmp_path / "r"), "engine", "restore", "--engine", "fake")
    said = whole["output"][0]["content"][0]["text"]
    assert code == 0 and [one["text"] for one in back["requests"]] == [said]


def test_a_request_that_no_session_holds_yet_is_named_as_lost(
    tmp_path: Path, slow_engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its response is stored or not; one that has a session is in the snapshot, and is not named."""
    pytest.importorskip("starlette")
    from gateway_stand import Gateway
    from thaw.gateway.settings import GatewaySettings
    from thaw.gateway.tenants import single

    gateway = Gateway(tmp_path / "r", slow_engine, single(TOKEN), GatewaySettings())
    client = httpx.Client(base_url=gateway.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
    asked = {"model": "fake", "max_output_tokens": 3000, "background": True}
    client.post("/v1/responses", json={**asked, "input": "a river"})
    until(lambda: any(len(job._pieces) > 3 for job in gateway.service.jobs.values()))
    held = threading.Event()
    for verb in ("open", "fork"):
        real = getattr(slow_engine, verb)
        monkeypatch.setattr(slow_engine, verb, partial(late, held, real))
    stored = client.post("/v1/responses", json={**asked, "input": "Why?"}).json()["id"]
    chat = {"model": "fake", "max_tokens": 4, "messages": [{"role": "user", "content": "How?"}]}
    said: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: said.append(client.post("/v1/chat/completions", json=chat)))
    asking.start()
    until(lambda: gateway.service.num_running == 3)
    words = ("engine", "snapshot", gateway.url, "--api-key", TOKEN)
    code, told = cli(capsys, *words)
    held.set()
    asking.join()
    assert code == 8 and [one["running"] for one in told["snapshots"]] == [1]
    assert [one["id"] for one in told["lost"]] == [stored, None]  # not the one that answers
    assert told["lost"][1]["request"] == said[0].headers["x-request-id"] and said[0].status_code == 200
    until(lambda: not gateway.service.num_running)
    code, told = cli(capsys, *words, "--replace")
    assert code == 0 and told["lost"] == []
    gateway.close()


def late(held: threading.Event, real: Callable[..., Any], *args: Any, **more: Any) -> Any:
    held.wait(60)
    return real(*args, **more)


def test_only_operators_snapshot(repo: Repository, tmp_path: Path, engine: Engine) -> None:
    pytest.importorskip("starlette")
    from gateway_stand import Gateway
    from thaw.gateway.settings import GatewaySettings
    from thaw.gateway.tenants import single

    gateway = Gateway(tmp_path / "r", engine, single(TOKEN), GatewaySettings())
    assert httpx.post(f"{gateway.url}/admin/snapshot").status_code == 401
    key = {"Authorization": f"Bearer {TOKEN}"}
    for body in (b'{"name": 3}', b'{"other": 1}', b"["):
        assert httpx.post(f"{gateway.url}/admin/snapshot", headers=key, content=body).status_code == 400
    gateway.close()
