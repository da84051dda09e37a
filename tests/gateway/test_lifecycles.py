"""Responses that are deleted, cancelled, followed, cut and cleaned up at any moment: one outcome, told to all alike."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_tenants import two

import thaw
from gateway_stand import TOKEN, Gateway, Start
from thaw.core.errors import CorruptDatabase, StorageFailed
from thaw.gateway.ledger import FILE, Ledger, LedgerRow
from thaw.gateway.metrics import MAX_BRANCHES
from thaw.gateway.service import ROOM_S
from thaw.gateway.settings import GatewaySettings, Keeping, Limits

openai = pytest.importorskip("openai")
LONG = "a long story about a river, and who lives there. " * 8
SECRET = "the secret river"


def ask(client: Any, **more: Any) -> Any:
    return client.responses.create(model="fake", **{"input": LONG, "max_output_tokens": 8, **more})


def quiet(gateway: Gateway) -> None:
    ended = time.monotonic() + 20
    while gateway.service.num_running or gateway.service.jobs:
        assert time.monotonic() < ended
        time.sleep(0.005)


class Held:
    """The ledger's write of a response's end is held until it is let go."""

    def __init__(self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.let_go = threading.Event(), threading.Event()
        put = gateway.service.ledger.put

        def held(row: LedgerRow) -> None:
            if row.kind == "response" and row.point is not None:
                self.reached.set()
                assert self.let_go.wait(20)
            put(row)

        monkeypatch.setattr(gateway.service.ledger, "put", held)


def test_a_client_that_goes_away_at_any_event_leaves_what_it_was_told(start: Start) -> None:
    gateway = start(step_s=0.002)
    client = gateway.openai()
    whole, num_ended = [event.type for event in ask(client, stream=True)], 0
    for num in range(1, len(whole) + 9):  # another answer may take some events more
        stream = ask(client, stream=True, input=f"{num} {LONG}")
        seen = [event for _, event in zip(range(num), stream, strict=False)]
        stream.close()
        quiet(gateway)
        kept = client.responses.retrieve(seen[0].response.id)
        told = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
        assert kept.status == "incomplete" and kept.output_text.startswith(told) and kept.thaw["point"]
        if seen[-1].type == whole[-1]:
            num_ended += 1
            assert seen[-1].response == kept
    assert num_ended


def test_one_that_is_deleted_at_any_event_is_gone(start: Start) -> None:
    gateway = start(step_s=0.002)
    client = gateway.openai()
    for num in range(1, 13):
        stream = ask(client, stream=True, input=f"{num} {LONG}")
        seen = [event for _, event in zip(range(num), stream, strict=False)]
        client.responses.delete(seen[0].response.id)
        rest = list(stream)
        assert rest and rest[-1].type == "response.incomplete"
        quiet(gateway)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(seen[0].response.id)


def test_one_that_is_deleted_while_its_end_is_written_is_gone(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = start()
    client = gateway.openai()
    held = Held(gateway, monkeypatch)
    made = ask(client, background=True)
    assert held.reached.wait(20)
    client.responses.delete(made.id)
    held.let_go.set()
    quiet(gateway)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_one_that_is_cancelled_while_its_end_is_written_ends_once(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who cancels, who follows and who asks later are told the same."""
    gateway = start()
    client = gateway.openai()
    held = Held(gateway, monkeypatch)
    made = ask(client, background=True)
    following = client.responses.retrieve(made.id, stream=True)
    assert held.reached.wait(20)
    threading.Timer(0.3, held.let_go.set).start()
    cancelled = client.responses.cancel(made.id)
    last = list(following)[-1].response
    assert cancelled.status == last.status == client.responses.retrieve(made.id).status == "incomplete"


def test_one_in_the_background_is_followed_from_each_event(start: Start) -> None:
    """While it runs and afterwards, after its last event too."""
    gateway = start(step_s=0.002)
    client = gateway.openai()
    made = ask(client, background=True)
    whole = list(client.responses.retrieve(made.id, stream=True))
    running = ask(client, background=True, input=f"again {LONG}")
    followed = [
        (id, after, list(client.responses.retrieve(id, stream=True, starting_after=after)))
        for after in range(len(whole))
        for id in (made.id, running.id)
    ]
    wholes = {made.id: whole, running.id: list(client.responses.retrieve(running.id, stream=True))}
    for id, after, told in followed:
        assert [event.sequence_number for event in told] == list(range(after + 1, len(wholes[id])))
        assert [event.type for event in told] == [event.type for event in wholes[id][after + 1 :]]


def test_who_followed_one_that_was_cut_learns_how_it_ended(start: Start) -> None:
    """As a gateway leaves it that was killed."""
    gateway = start()
    made = ask(gateway.openai())
    row = gateway.service.ledger.get("", "response", made.id)
    assert row is not None
    head = {**row.record["reply"], "status": "in_progress", "output": [], "usage": None}
    gateway.service.ledger.put(
        LedgerRow(
            kind="response", id=made.id, namespace="", status="in_progress", parent=made.thaw["point"],
            record={"reply": head, "input": [], "pieces": []},
        )
    )  # fmt: skip
    assert gateway.openai().responses.retrieve(made.id).status == "failed"
    gateway.close()
    client = start().openai()
    assert client.responses.retrieve(made.id).status == "incomplete"
    for after in (0, 1, 2, 500):
        told = list(client.responses.retrieve(made.id, stream=True, starting_after=after))
        assert told[-1].type == "response.incomplete" and told[-1].sequence_number > after
        assert told[-1].response.thaw["point"] == made.thaw["point"]


def test_what_goes_wrong_in_a_stream_is_told_and_says_nothing_of_the_client(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = start(step_s=0.002)
    view = gateway.engine.view

    def broken(session: Any) -> Any:
        raise RuntimeError(SECRET)

    stream = gateway.openai().chat.completions.create(
        model="fake", messages=[{"role": "user", "content": SECRET}], max_tokens=30, stream=True
    )
    next(iter(stream))
    monkeypatch.setattr(gateway.engine, "view", broken)
    with pytest.raises(openai.APIError, match="see its log"):
        list(stream)
    messages = gateway.anthropic().messages
    monkeypatch.setattr(gateway.engine, "view", view)
    with messages.stream(model="fake", max_tokens=30, messages=[{"role": "user", "content": SECRET}]) as events:
        monkeypatch.setattr(gateway.engine, "view", broken)
        with pytest.raises(Exception, match="see its log"):
            list(events)
    quiet(gateway)
    logs = [record for record in caplog.records if record.name.startswith(("thaw", "uvicorn", "asyncio"))]
    told = "\n".join(logging.Formatter().format(record) for record in logs)
    assert "RuntimeError" in told and "secret" not in told


def test_a_conversation_is_deleted_between_responses_and_changed_at_any_time(start: Start) -> None:
    gateway = start(step_s=0.005)
    client = gateway.openai()
    conversation = client.conversations.create(metadata={"of": "ada"})
    stream = ask(client, conversation=conversation.id, stream=True, max_output_tokens=60)
    next(iter(stream))
    with pytest.raises(openai.ConflictError):
        client.conversations.delete(conversation.id)
    client.conversations.update(conversation.id, metadata={"of": "bob"})
    assert list(stream)[-1].type == "response.incomplete"
    quiet(gateway)
    assert client.conversations.retrieve(conversation.id).metadata == {"of": "bob"}
    assert len(client.conversations.items.list(conversation.id).data) == 2
    client.conversations.delete(conversation.id)
    with pytest.raises(openai.NotFoundError):
        ask(client, conversation=conversation.id)


def sweep(gateway: Gateway) -> int:
    """In the gateway's own loop, as it does itself."""
    loop = next(iter(gateway.server.server_state.connections)).loop  # type: ignore[union-attr]
    return asyncio.run_coroutine_threadsafe(gateway.service.sweep(), loop).result(20)


def test_what_a_running_response_goes_on_from_is_not_cleaned_up(start: Start) -> None:
    gateway = start(settings=GatewaySettings(keeping=Keeping(nbytes=0)), step_s=0.005)
    client = gateway.openai()
    first = ask(client)
    stream = ask(client, previous_response_id=first.id, input="Go on.", stream=True, max_output_tokens=100)
    next(iter(stream))
    sweep(gateway)
    done = list(stream)[-1].response
    assert done.thaw["parent"] == first.thaw["point"] and gateway.repo.show(done.thaw["point"]).tokens
    quiet(gateway)
    assert sweep(gateway) == 2


def test_an_open_session_whose_commit_was_cleaned_up_is_not_gone_on_from(start: Start) -> None:
    """Its next turn is reread, and is no conflict."""
    gateway = start(settings=GatewaySettings(keeping=Keeping(nbytes=0)))
    client = gateway.openai()
    history = [{"role": "user", "content": LONG}]
    for turn in range(3):
        reply = client.chat.completions.create(model="fake", messages=history, max_tokens=8)
        assert reply.thaw["source"] == "new"
        assert sweep(gateway) == 1
        history += [
            {"role": "assistant", "content": reply.choices[0].message.content},
            {"role": "user", "content": f"Go on {turn}."},
        ]
    assert len(gateway.service.live) == 0


def test_many_branches_make_few_series(start: Start) -> None:
    gateway = start()
    client = gateway.openai()
    conversation = client.conversations.create()
    ask(client, conversation=conversation.id, max_output_tokens=1)
    for i in range(MAX_BRANCHES + 20):
        gateway.service.metrics._branch("default", f"branch-{i}")
    ask(client, max_output_tokens=1, extra_body={"thaw": {"branch": "another"}})
    text = httpx.get(f"{gateway.url}/metrics", headers={"x-api-key": TOKEN}).text
    assert 'thaw:prompt_tokens_total{branch="*",tenant="default"}' in text and "another" not in text
    assert 'branch="conversations/*"' in text and conversation.id not in text


def test_one_tenant_leaves_room_for_the_requests_of_others(start: Start) -> None:
    gateway = start(tenants=two(), settings=GatewaySettings(limits=Limits(requests=8)), step_s=0.01)
    flood = gateway.openai("key-a")
    streams = [ask(flood, stream=True, max_output_tokens=300) for _ in range(6)]
    with pytest.raises(openai.InternalServerError) as refused:
        ask(flood)
    assert refused.value.status_code == 503 and "6" not in refused.value.message.partition("message")[2]
    assert ask(gateway.openai("key-b")).usage.output_tokens == 8
    for stream in streams:
        stream.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB of its own; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_on_a_full_disk_nothing_is_generated_and_all_goes_on_when_there_is_room(
    start: Start, small_disk: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").symlink_to(small_disk)
    gateway = start(name="full/runs")
    client = gateway.openai()
    kept = ask(client)
    time.sleep(ROOM_S)
    free = subprocess.run(["df", "--output=avail", "-B1", str(small_disk)], capture_output=True, text=True).stdout
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(int(free.split()[-1]) - (1 << 19)))
    before = gateway.num_forwarded
    for kind in ({}, {"stream": True}, {"store": False}):
        with pytest.raises(openai.InternalServerError) as refused:
            ask(client, input="more", **kind)
        assert refused.value.status_code == 503 and str(small_disk) not in str(refused.value)
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "x"}], max_tokens=8)
    assert gateway.num_forwarded == before
    assert client.responses.retrieve(kept.id).output_text == kept.output_text
    ballast.unlink()
    assert ask(client, previous_response_id=kept.id, input="x").thaw["parent"] == kept.thaw["point"]


def test_a_ledger_that_cannot_be_opened_says_why(small_disk: Path, tmp_path: Path) -> None:
    free = subprocess.run(["df", "--output=avail", "-B1", str(small_disk)], capture_output=True, text=True).stdout
    (small_disk / "ballast").write_bytes(bytes(int(free.split()[-1])))
    with pytest.raises(StorageFailed, match="full"):
        Ledger(small_disk)
    (tmp_path / FILE).write_bytes(b"no database at all " * 1000)
    with pytest.raises(CorruptDatabase, match=f"{FILE} is damaged .*file is not a database.* Move it away") as refused:
        Ledger(tmp_path)
    assert "--rebuild" not in str(refused.value), "which makes thaw.db again, and not this file"


def test_without_a_damaged_ledger_its_responses_are_lost_and_what_chats_share_is_not(start: Start) -> None:
    before = start()
    known = ask(before.openai(), store=True)
    before.close()
    (before.repo.path / FILE).write_bytes(b"no database at all " * 1000)
    with pytest.raises(CorruptDatabase, match="Move it away"):
        start()
    for damaged in before.repo.path.glob(f"{FILE}*"):
        damaged.rename(damaged.with_name(f"damaged-{damaged.name}"))
    after = start()
    with pytest.raises(openai.NotFoundError):
        after.openai().responses.retrieve(known.id)
    assert after.repo.session(known.thaw["point"]).num_tokens >= known.usage.total_tokens
    again = ask(after.openai())
    assert again.usage.input_tokens_details.cached_tokens >= known.usage.input_tokens - 1


def test_an_engine_that_dies_twenty_times_loses_nothing_and_doubles_nothing(start: Start) -> None:
    """In the middle of a stream, each time; what was acknowledged before is there, and is what is continued from."""
    gateway = start(step_s=0.002, reconnect=lambda: thaw.load_engine("fake", step_s=0.002))
    client = gateway.openai()
    last = ask(client)
    for _ in range(20):
        events = []
        for event in ask(client, stream=True, max_output_tokens=24, previous_response_id=last.id, input="On."):
            events.append(event)
            if len(events) == 10:
                threading.Thread(target=gateway.service.engine.close).start()
        assert [event.sequence_number for event in events] == list(range(len(events)))
        done = events[-1].response
        told = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert done.output_text == told and done.usage.output_tokens == 24
        assert done.thaw["parent"] == last.thaw["point"]
        assert client.responses.retrieve(last.id).output_text == last.output_text
        last = done


def test_one_that_was_parked_before_it_said_anything_begins_again(start: Start) -> None:
    gateway = start(step_s=0.3)
    client = gateway.openai()
    first = ask(client, max_output_tokens=1)
    made = ask(
        client, background=True, input=LONG * 4, previous_response_id=first.id, extra_body={"seed": 5},
        instructions="Be brief.",
    )  # fmt: skip
    while not any(job.read for job in gateway.service.jobs.values()):
        time.sleep(0.005)
    gateway.close()
    again = start(settings=GatewaySettings(restore=True)).openai()
    ended = time.monotonic() + 20
    while again.responses.retrieve(made.id).usage is None or again.responses.retrieve(made.id).usage.output_tokens < 8:
        assert time.monotonic() < ended
        time.sleep(0.02)
    done = again.responses.retrieve(made.id)
    assert (done.created_at, done.instructions) == (made.created_at, "Be brief.")
    assert done.thaw["parent"] == first.thaw["point"]
    told = list(again.responses.retrieve(made.id, stream=True))
    assert [event.sequence_number for event in told] == list(range(len(told)))


@pytest.mark.parametrize("place", ["branch", "conversation"])
def test_who_begins_again_begins_where_it_did_before(start: Start, place: str) -> None:
    """What was parked with nothing said has moved neither its branch nor its conversation."""
    gateway = start(step_s=0.3)
    client = gateway.openai()
    where: dict[str, Any] = {"extra_body": {"thaw": {"branch": "mine"}}}
    if place == "conversation":
        where = {"conversation": client.conversations.create().id}
    first = ask(client, max_output_tokens=1, **where)
    on = where if place == "conversation" else {**where, "previous_response_id": first.id}
    made = ask(client, background=True, input=LONG * 4, max_output_tokens=2, **on)
    while not any(job.read for job in gateway.service.jobs.values()):
        time.sleep(0.005)
    gateway.close()
    after = start(settings=GatewaySettings(restore=True))
    quiet(after)
    done = after.openai().responses.retrieve(made.id)
    assert (done.thaw["parent"], done.usage.output_tokens) == (first.thaw["point"], 2)
    branch = "mine" if place == "branch" else f"conversations/{where['conversation']}"
    assert str(after.repo.resolve(branch).commit) == done.thaw["point"]
    assert after.repo.show(branch).text.count(LONG) == 5


def test_one_that_cannot_be_resumed_has_failed_and_the_rest_is_served(start: Start) -> None:
    """Its conversation was deleted while it was parked."""
    gateway = start(step_s=0.005)
    client = gateway.openai()
    conversation = client.conversations.create()
    made = ask(client, background=True, conversation=conversation.id, max_output_tokens=2000)
    following = iter(client.responses.retrieve(made.id, stream=True))
    while next(following).type != "response.output_text.delta":
        pass
    gateway.close()
    between = start()
    between.openai().conversations.delete(conversation.id)
    between.close()
    client = start(settings=GatewaySettings(restore=True)).openai()
    assert client.responses.retrieve(made.id).status == "failed"
    assert ask(client).usage.output_tokens == 8


def test_who_comes_while_the_gateway_ends_is_told_to_come_again(start: Start) -> None:
    """Until the last one that runs is committed, it answers."""
    gateway = start(step_s=0.4)
    client = gateway.openai()
    stream = client.responses.create(model="fake", input="On.", max_output_tokens=500, stream=True)
    events = [next(stream)]
    told: list[tuple[int, str]] = []
    gateway.server.should_exit = True
    while not told or told[-1][0] == 200:
        reply = httpx.get(f"{gateway.url}/health", timeout=30)
        told.append((reply.status_code, reply.json()["status"]))
    assert told[-1] == (503, "ending")
    with pytest.raises(openai.APIStatusError) as refused:
        client.responses.create(model="fake", input="Another one.", max_output_tokens=1)
    assert refused.value.status_code == 503 and int(refused.value.response.headers["retry-after"]) >= 1
    events += stream
    gateway.close()
    kept = start().openai().responses.retrieve(events[0].response.id)
    assert kept.status == "incomplete" and kept.thaw["point"]
