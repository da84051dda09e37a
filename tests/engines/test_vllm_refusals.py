"""Why a request was refused, in the place of vLLM's own "Internal server error": the middleware around a server's app.

The app here answers as vLLM's does; `on_vllm/test_http.py` asks the real one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from thaw.core.errors import Busy, NotFound, ThawError
from thaw.engines.served import protocol
from thaw.engines.served.mailbox import SCHEDULER, Mailbox
from thaw.engines.served.protocol import Answer
from thaw.engines.vllm.refusals import Refusals

ID = "1" * 32
FAILED = {"error": {"message": "Internal server error", "type": "InternalServerError", "param": None, "code": 500}}
PLAIN, EVENT = json.dumps(FAILED).encode(), b"data: " + json.dumps(FAILED).encode() + b"\n\n"
DONE = b"data: [DONE]\n\n"


def body(**message: object) -> bytes:
    said = {"op": "run", "id": ID, "record": "2" * 32, **message}
    return json.dumps({"prompt": [1, 2], "kv_transfer_params": {protocol.KEY: said}}).encode()


def exchange(mail: Path, sent: bytes, status: int, replies: list[bytes], *, streams: bool = False) -> tuple[Any, bytes]:
    """(the reply's start, its body) of a server that answers `sent` so; the body comes in parts of 10 bytes."""
    extra = {protocol.KEY: {"mail": str(mail)}}
    transfer = SimpleNamespace(kv_connector="ThawConnector", kv_connector_extra_config=extra)
    state = SimpleNamespace(vllm_config=SimpleNamespace(kv_transfer_config=transfer, instance_id="x"))
    scope = {"type": "http", "method": "POST", "app": SimpleNamespace(state=state)}
    kind = b"text/event-stream" if streams else b"application/json"
    parts = [sent[i : i + 10] for i in range(0, len(sent), 10)]
    coming = [{"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)]
    out: list[Any] = []

    async def receive() -> Any:
        return coming.pop(0)

    async def send(event: Any) -> None:
        out.append(event)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        headers = [(b"content-type", kind), (b"content-length", str(sum(map(len, replies))).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for i, reply in enumerate(replies):
            await send({"type": "http.response.body", "body": reply, "more_body": i + 1 < len(replies)})

    asyncio.run(Refusals(app)(scope, receive, send))
    start, *rest = out
    return start, b"".join(event.get("body", b"") for event in rest)


def left(mail: Path, error: ThawError, sender: str | int = SCHEDULER) -> Path:
    Mailbox(mail).answer(ID, sender, Answer(kind=error.kind, error=str(error)))
    return mail / "answers" / f"{ID}.{sender}"


@pytest.mark.parametrize("sender", [SCHEDULER, 1])
@pytest.mark.parametrize("rank", ["", "dp1"], ids=["one engine", "a rank's"])
def test_the_reason_takes_the_place_of_the_servers_500(tmp_path: Path, sender: str | int, rank: str) -> None:
    letter = left(tmp_path / "mail" / rank, Busy("records: this caller has 2 of 2"), sender)
    start, said = exchange(tmp_path / "mail", body(), 500, [PLAIN[:20], PLAIN[20:]])
    assert start["status"] == 429 and dict(start["headers"])[b"content-length"] == str(len(said)).encode()
    assert json.loads(said)["error"] == {
        "message": "records: this caller has 2 of 2", "type": "busy", "param": None, "code": 429,
    }  # fmt: skip
    assert not letter.exists()


@pytest.mark.parametrize("events", [[EVENT, DONE], [EVENT + DONE], [DONE]], ids=["two", "in one part", "none of it"])
def test_a_stream_ends_with_the_reason(tmp_path: Path, events: list[bytes]) -> None:
    left(tmp_path / "mail", NotFound("it is gone"))
    start, said = exchange(tmp_path / "mail", body(), 200, events, streams=True)
    first, done = said.split(b"\n\n", 1)
    assert start["status"] == 200 and done == DONE
    assert json.loads(first.removeprefix(b"data: "))["error"]["type"] == "not-found"


def test_a_stream_keeps_what_came_before_the_reason(tmp_path: Path) -> None:
    left(tmp_path / "mail", NotFound("it is gone"))
    token = b'data: {"choices": [{"text": "a"}]}\n\n'
    _, said = exchange(tmp_path / "mail", body(), 200, [token, token + DONE], streams=True)
    assert said.startswith(token * 2 + b"data: {") and said.endswith(DONE) and b"it is gone" in said


def test_a_stream_that_goes_well_passes(tmp_path: Path) -> None:
    Mailbox(tmp_path / "mail")
    token = b'data: {"choices": [{"text": "a"}]}\n\n'
    assert exchange(tmp_path / "mail", body(), 200, [token, token + DONE], streams=True)[1] == token * 2 + DONE


def test_a_stream_of_thaws_own_client_passes(tmp_path: Path) -> None:
    letter = left(tmp_path / "mail", NotFound("it is gone"))
    assert exchange(tmp_path / "mail", body(caller="3" * 32), 200, [EVENT, DONE], streams=True)[1] == EVENT + DONE
    assert letter.exists(), "it reads the mail itself"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"no JSON",
        b'{"prompt": "thaw"}',
        b'["thaw"]',
        b'{"user": "thaw", "kv_transfer_params": {}}',
        body(id="../x"),
        b'{"thaw":' + b"[" * 100_000,
    ],
    ids=["nothing", "no JSON", "a prompt", "a list", "a user", "a path", "brackets"],
)
@pytest.mark.parametrize(("status", "reply"), [(500, PLAIN), (200, b'{"choices": []}'), (400, b"{}")])
def test_everything_else_passes_as_it_comes(tmp_path: Path, sent: bytes, status: int, reply: bytes) -> None:
    left(tmp_path / "mail", NotFound("of another request"))
    start, said = exchange(tmp_path / "mail", sent or b" ", status, [reply])
    assert (start["status"], said) == (status, reply)
    assert dict(start["headers"])[b"content-length"] == str(len(reply)).encode()


def test_a_failure_of_which_nothing_is_known_stays_as_it_is(tmp_path: Path) -> None:
    Mailbox(tmp_path / "mail")
    start, said = exchange(tmp_path / "mail", body(), 500, [PLAIN])
    assert start["status"] == 500 and said == PLAIN


def test_of_two_requests_under_way_with_one_id_the_later_is_refused() -> None:
    """Each part of its body comes as it was, and then what makes it no JSON: the server does not take it."""
    taken: list[bytes] = []
    replies: list[list[Any]] = []
    inner: list[Refusals] = []

    async def ask(parts: list[bytes]) -> None:
        coming = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        coming.append({"type": "http.request", "body": b"", "more_body": False})
        out: list[Any] = []
        replies.append(out)

        async def receive() -> Any:
            return coming.pop(0)

        async def send(event: Any) -> None:
            out.append(event)

        await inner[0]({"type": "http", "method": "POST"}, receive, send)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        said = b""
        while (event := await receive())["more_body"]:
            said += event["body"]
        taken.append(said + event["body"])
        if len(taken) == 1:
            await ask([body(), b" "])
        try:
            json.loads(taken.pop())
            status = 200
        except ValueError:
            status = 422
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}", "more_body": False})

    inner.append(Refusals(app))
    asyncio.run(ask([body()]))
    asyncio.run(ask([body()]))
    first, second, third = ([replies[i][0]["status"], json.loads(replies[i][1]["body"])] for i in range(3))
    assert first == third == [200, {}]
    assert second[0] == 400 and "under way has a message of this id" in second[1]["error"]["message"]
