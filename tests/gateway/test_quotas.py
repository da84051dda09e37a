"""Quotas hold for requests that come at once, are cancelled, fail, or whose client is gone."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from test_tenants import two

from gateway_stand import Gateway, Start
from thaw.core.errors import InvalidRequest
from thaw.gateway import tenants
from thaw.gateway.ledger import Ledger, LedgerRow
from thaw.gateway.settings import GatewaySettings, Keeping
from thaw.gateway.tenants import load

openai = pytest.importorskip("openai")
LONG = "a long story about a river, and who lives there. " * 8


def chat(client: Any, text: str, **more: Any) -> Any:
    return client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": text}], **{"max_tokens": 8, **more}
    )


def at_once(num: int, do: Any) -> list[Any]:
    """What each gave: its reply, or the error that it raised."""
    barrier = threading.Barrier(num)

    def one(i: int) -> Any:
        barrier.wait()
        try:
            return do(i)
        except openai.APIError as error:
            return error

    with ThreadPoolExecutor(num) as pool:
        return list(pool.map(one, range(num)))


def quiet(gateway: Gateway) -> None:
    ended = time.monotonic() + 20
    while gateway.service.num_running:
        assert time.monotonic() < ended
        time.sleep(0.01)


def spent(gateway: Gateway) -> int:
    tenant = gateway.service.tenants.of_namespace("a")
    assert (tenant.running, tenant.promised, tenant.unwritten) == (0, 0, 0)
    return tenant.meter.last_minute()


@pytest.mark.parametrize("tokens", [2, 120], ids=["by their prompts", "by their answers"])
def test_requests_that_come_at_once_share_a_quota(start: Start, tokens: int) -> None:
    """Beyond it by one request at most, as when they come one after another."""
    gateway = start(tenants=two(tokens_per_minute=1000), step_s=0.002)
    text = LONG if tokens == 2 else "x"
    before = gateway.num_forwarded
    done = at_once(16, lambda i: chat(gateway.openai("key-a"), f"{i} {text}", max_tokens=tokens))
    quiet(gateway)
    refused = [one for one in done if isinstance(one, openai.RateLimitError)]
    assert len(refused) + sum(not isinstance(one, Exception) for one in done) == 16
    assert 16 - len(refused) in ((3,) if tokens == 2 else (6, 7, 8, 9))
    assert all(one.response.headers["retry-after"] for one in refused)
    assert gateway.num_forwarded - before < 1000 + 450
    assert 0 <= spent(gateway) - (gateway.num_forwarded - before) <= 16


def test_choices_count_each(start: Start) -> None:
    gateway = start(tenants=two(tokens_per_minute=1000))
    with pytest.raises(openai.RateLimitError):
        chat(gateway.openai("key-a"), "x", n=8, max_tokens=200)
    assert len(chat(gateway.openai("key-a"), "x", n=8, max_tokens=20).choices) == 8
    assert spent(gateway) >= 160


def test_what_a_failing_request_computed_counts(start: Start) -> None:
    """Its branch has moved meanwhile, so that there is a conflict once all has been generated."""
    gateway = start(tenants=two(tokens_per_minute=100_000), step_s=0.005)
    client = gateway.openai("key-a")
    before, ran = spent(gateway), gateway.num_forwarded
    stream = chat(client, LONG, stream=True, max_tokens=400, extra_body={"thaw": {"branch": "main"}})
    next(iter(stream))
    chat(client, "x", max_tokens=1, extra_body={"thaw": {"branch": "main"}})
    with pytest.raises(openai.APIError, match="somebody else moved it"):
        list(stream)
    quiet(gateway)
    assert 0 <= spent(gateway) - before - (gateway.num_forwarded - ran) <= 2
    assert gateway.num_forwarded - ran > 400


def test_what_was_cancelled_or_left_counts(start: Start) -> None:
    gateway = start(tenants=two(tokens_per_minute=100_000), step_s=0.002)
    client = gateway.openai("key-a")
    stream = chat(client, LONG, stream=True, max_tokens=2000)
    for _ in zip(range(6), stream, strict=False):
        pass
    stream.close()
    quiet(gateway)
    assert len(LONG) < gateway.num_forwarded <= spent(gateway) < 2000
    made = client.responses.create(model="fake", input="a" + LONG, max_output_tokens=2000, background=True)
    following = client.responses.retrieve(made.id, stream=True)
    for _ in zip(range(8), following, strict=False):
        pass
    client.responses.cancel(made.id)
    quiet(gateway)
    assert 2 * len(LONG) < gateway.num_forwarded <= spent(gateway) < 4000


def test_bytes_that_are_being_made_count(start: Start) -> None:
    gateway = start(tenants=two(bytes=60_000), step_s=0.002)
    done = at_once(16, lambda i: chat(gateway.openai("key-a"), f"{i} {LONG}", max_tokens=2))
    quiet(gateway)
    kept = [one for one in done if not isinstance(one, Exception)]
    assert 1 <= len(kept) < 16
    assert gateway.service.ledger.nbytes("a") < 60_000 + 20_000
    assert spent(gateway) > 0


def test_what_clients_store_beside_kv_counts(start: Start) -> None:
    gateway = start(tenants=two(bytes=100_000))
    client = gateway.openai("key-a")
    client.conversations.create(items=[{"role": "user", "content": "x" * 200_000}])
    for refused in (
        lambda: client.responses.create(model="fake", input="x", max_output_tokens=1),
        lambda: client.conversations.create(items=[{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(openai.RateLimitError):
            refused()
    gateway.openai("key-b").conversations.create(items=[{"role": "user", "content": "x"}])


def test_deleting_frees_a_quota_when_gc_has_freed_the_bytes(start: Start) -> None:
    import asyncio

    gateway = start(tenants=two(bytes=20_000), settings=GatewaySettings(keeping=Keeping(sweep_s=10_000)))
    client = gateway.openai("key-a")
    made = [client.responses.create(model="fake", input=f"{i}{LONG}", max_output_tokens=2) for i in range(2)]
    for one in made:
        client.responses.delete(one.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(one.id)
    with pytest.raises(openai.RateLimitError):
        client.responses.create(model="fake", input="x", max_output_tokens=1)
    stored = sum(file.stat().st_size for file in gateway.folder.rglob("packs/*"))
    assert asyncio.run(gateway.service.sweep()) == 2
    assert sum(file.stat().st_size for file in gateway.folder.rglob("packs/*")) < stored / 2
    assert gateway.service.ledger.nbytes("a") == 0
    client.responses.create(model="fake", input="x", max_output_tokens=1)


def test_the_ledger_counts_what_it_holds(tmp_path: Path) -> None:
    def row(id: str, created: float, nbytes: int = 100, kind: str = "response") -> LedgerRow:
        return LedgerRow(
            kind=kind, id=id, namespace="a", status="completed", record={"x": "y" * 50}, nbytes=nbytes,
            created=created, point=f"p{id}",
        )  # fmt: skip

    ledger = Ledger(tmp_path)
    for i in range(4):
        ledger.put(row(f"r{i}", float(i)))
        ledger.put(row(f"r{i}", float(i)))
    each = ledger.nbytes("a") // 4
    assert 150 < each < 180 and ledger.nbytes("b") == 0
    assert ledger.delete("a", "response", "r2") and not ledger.delete("a", "response", "r2")
    assert ledger.nbytes("a") == 3 * each + 102
    assert ledger.expire(before=-1.0, max_nbytes=1000) == (0, 0.0)
    assert ledger.expire(before=1.5, max_nbytes=1000, held={"pr1"}) == (1, 1.0)
    assert ledger.get("a", "response", "r1") is not None and ledger.get("a", "response", "r2") is None
    assert ledger.expire(before=1.5, max_nbytes=1000) == (2, 3.0)
    assert ledger.nbytes("a") == each
    ledger.close()
    again = Ledger(tmp_path)
    assert again.nbytes("a") == each
    again.close()


def test_a_namespace_has_one_quota(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text('[{"namespace": "a", "keys": ["x"]}, {"namespace": "a", "keys": ["y"]}]')
    path.chmod(0o600)
    with pytest.raises(InvalidRequest, match="twice"):
        load(path)


def test_a_meter_holds_a_minute_though_no_quota_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants, "MINUTE_S", 0.5)
    meter = tenants.Meter()
    for tokens in (5, 7):
        meter.add(tokens)
        time.sleep(1.1)
    meter.add(11)
    assert len(meter._spent) == 1 and meter._sum == 11
