"""What is kept, for how long and how much of it; what the series say; and what the verb refuses."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway_stand import TOKEN, Gateway, Start
from thaw import cli
from thaw.core.errors import NotFound, StorageFailed
from thaw.gateway.ledger import Ledger, LedgerRow
from thaw.gateway.settings import GatewaySettings, Keeping, Limits

openai = pytest.importorskip("openai")

from thaw.gateway.place import ParentFinder  # noqa: E402

LONG = "a long story about a river, and who lives there. " * 8


def respond(gateway: Gateway, **more: Any) -> Any:
    return gateway.openai().responses.create(model="fake", **{"input": LONG, "max_output_tokens": 8, **more})


def sweep(gateway: Gateway) -> int:
    import asyncio

    return asyncio.run(gateway.service.sweep())


def test_the_oldest_go_first_and_what_has_a_name_stays(start: Start) -> None:
    gateway = start(settings=GatewaySettings(keeping=Keeping(nbytes=0)))
    named = respond(gateway, extra_body={"thaw": {"branch": "main"}}, input=f"named {LONG}")
    loose = respond(gateway, input=f"loose {LONG}")
    assert sweep(gateway) == 2
    with pytest.raises(openai.NotFoundError):
        gateway.openai().responses.retrieve(loose.id)
    assert gateway.repo.resolve("main").commit == named.thaw["point"]
    with pytest.raises(NotFound):
        gateway.repo.resolve(loose.thaw["point"])


def test_what_fits_is_kept_and_nothing_of_it_is_lost(start: Start) -> None:
    gateway = start()
    kept = [respond(gateway, input=f"{i} {LONG}") for i in range(3)]
    assert sweep(gateway) == 0
    assert all(gateway.openai().responses.retrieve(one.id).output_text == one.output_text for one in kept)
    on = respond(gateway, input="x", previous_response_id=kept[0].id)
    assert on.thaw["cached_tokens"] == kept[0].usage.total_tokens - 1


def test_a_ledger_lets_go_by_age_and_by_bytes(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    now = time.time()
    for i in range(6):
        ledger.put(
            LedgerRow(
                kind="response", id=f"r{i}", namespace="", status="completed", record={}, nbytes=10, created=now + i
            )
        )
    ledger.put(LedgerRow(kind="response", id="runs", namespace="", status="in_progress", record={}, created=now - 99))
    ledger.put(LedgerRow(kind="conversation", id="c", namespace="", status="completed", record={}, created=now - 99))
    assert ledger.expire(before=now + 1.5, max_nbytes=1000)[0] == 2
    assert ledger.expire(before=0, max_nbytes=25)[0] == 2
    assert [ledger.get("", "response", f"r{i}") is not None for i in range(6)] == [False] * 4 + [True] * 2
    assert ledger.get("", "response", "runs") is not None and ledger.get("", "conversation", "c") is not None
    assert ledger.get("other", "response", "r5") is None
    assert ledger.interrupt() == 1 and ledger.get("", "response", "runs").status == "incomplete"  # type: ignore[union-attr]
    ledger.close()


def test_rows_that_come_at_once_are_written_with_one_sync(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    said: list[str] = []
    ledger._connection.set_trace_callback(said.append)
    with ThreadPoolExecutor(20) as threads:
        with ledger._lock:
            done = [threads.submit(ledger.put, row_of(i)) for i in range(20)]
            while len(ledger._waiting) < 20:
                time.sleep(0.001)
        assert all(one.result() is None for one in done)
    assert said.count("COMMIT") == 1
    assert all(ledger.get("", "response", f"r{i}") is not None for i in range(20)) and ledger.nbytes("") == 20 * 12
    ledger.close()


def test_rows_that_cannot_be_written_are_nobodys(tmp_path: Path) -> None:
    """Each of those that wait is told, and nothing of them counts."""
    ledger = Ledger(tmp_path)
    ledger.put(row_of(0))
    ledger._connection.execute("PRAGMA query_only = 1")
    with ThreadPoolExecutor(3) as threads:
        with ledger._lock:
            done = [threads.submit(ledger.put, row_of(i)) for i in (1, 2, 3)]
            while len(ledger._waiting) < 3:
                time.sleep(0.001)
        assert all(isinstance(one.exception(), StorageFailed) for one in done)
    assert ledger.nbytes("") == 12
    ledger._connection.execute("PRAGMA query_only = 0")
    ledger.put(row_of(4))
    assert [ledger.get("", "response", f"r{i}") is not None for i in range(5)] == [True, False, False, False, True]
    ledger.close()


def row_of(number: int) -> LedgerRow:
    return LedgerRow(
        kind="response", id=f"r{number}", namespace="", status="completed", record={}, nbytes=10, created=number
    )


def test_few_sessions_stay_open_and_the_rest_comes_back_from_the_disk(start: Start) -> None:
    gateway = start(settings=GatewaySettings(limits=Limits(live_sessions=2)))
    made = [respond(gateway, input=f"{i} {LONG}") for i in range(6)]
    assert gateway.num_open(2) <= 2
    for one in made:
        kid = respond(gateway, input="x", previous_response_id=one.id)
        assert kid.thaw["cached_tokens"] == one.usage.total_tokens - 1
    assert gateway.num_open(2) <= 2


def test_the_series_are_the_engines_own_counts(gateway: Gateway) -> None:
    first = respond(gateway)
    second = respond(gateway, input="x", previous_response_id=first.id, extra_body={"thaw": {"branch": "main"}})
    text = httpx.get(gateway.url + "/metrics", headers={"x-api-key": TOKEN}).text

    def series(name: str, branch: str) -> float:
        found = re.search(rf'^{name}{{branch="{branch}",tenant="default"}} (\S+)$', text, re.M)
        assert found, (name, text)
        return float(found[1])

    assert series("thaw:prompt_tokens_total", "") == first.usage.input_tokens
    assert series("thaw:cached_tokens_total", "main") == second.thaw["cached_tokens"]
    assert series("thaw:prefilled_tokens_total", "main") == second.thaw["prefilled_tokens"]
    assert series("thaw:generated_tokens_total", "main") == 8
    assert series("thaw:saved_seconds_total", "main") > 0
    assert 'thaw:requests_total{endpoint="/v1/responses",status="200",tenant="default"} 2' in text
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line and not line.startswith("#")}
    assert all(name.startswith("thaw:") for name in names)


def test_the_verb_says_what_it_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    cli.main(["init", str(tmp_path / "runs")])
    at = ["-C", str(tmp_path / "runs"), "serve", "--engine", "fake", "--json"]
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps([{"namespace": "a", "keys": ["k"]}]))
    keys.chmod(0o644)
    capsys.readouterr()
    for words, why in (
        (["--keys", str(keys)], "0600"),
        (["--tool-calls", "gpt"], "hermes"),
        (["--keys", str(tmp_path / "none.json")], "none.json"),
    ):
        assert cli.main([*at, *words]) != 0
        assert why in "".join(capsys.readouterr())
    monkeypatch.setenv("THAW_NAMESPACE", "acme")
    assert cli.main(at) != 0
    assert "--keys" in "".join(capsys.readouterr())


@pytest.mark.parametrize("num_open", [0, 1])
def test_what_gc_removes_while_a_chat_looks_for_it_is_read_again(
    start: Start, monkeypatch: pytest.MonkeyPatch, num_open: int
) -> None:
    """It named no point, so none is missing. `num_open`: also where the session behind it is open until then."""
    limits, keeping = Limits(live_sessions=num_open), Keeping(lifetime_s=0.0)
    gateway = start(settings=GatewaySettings(limits=limits, keeping=keeping))
    client = gateway.openai()
    told = [{"role": "user", "content": LONG}]
    client.chat.completions.create(model="fake", messages=told, max_tokens=8)
    assert gateway.num_open(num_open) == num_open
    looks = ParentFinder._asked

    async def swept(self: Any, *args: Any, **options: Any) -> Any:
        found = await looks(self, *args, **options)
        gateway.service.ledger.expire(before=time.time(), max_nbytes=0)
        await gateway.service.repo.gc(keep_reflog_s=0.0)
        return found

    monkeypatch.setattr(ParentFinder, "_asked", swept)
    like = [{"role": "user", "content": f"{LONG} And then?"}]
    again = client.chat.completions.create(model="fake", messages=like, max_tokens=8)
    assert again.thaw["source"] == ("live" if num_open else "new")
    assert (again.thaw["cached_tokens"] > len(LONG)) == bool(num_open)
    assert gateway.repo.show(again.thaw["point"]).tokens
