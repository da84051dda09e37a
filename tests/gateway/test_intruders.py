"""Ten thousand tries of one tenant to reach, match or infer what another has: by ids, points, names, texts and counts.

Each kind of try is made by the owner as well, with what is really there, and succeeds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote, unquote

import httpx
import pytest
from test_tenants import two

from gateway_stand import Gateway, Start

openai = pytest.importorskip("openai")
NUM_TRIES = 10_000
SECRET = "the secret river of the first tenant "
LONG = SECRET * 12
HEX = "0123456789abcdef"
Try = tuple[str, str, dict[str, Any] | None]
"""Method, path, body."""


class Mine:
    """What the first tenant has."""

    def __init__(self, gateway: Gateway) -> None:
        client = gateway.openai("key-a")
        ask: dict[str, Any] = {"model": "fake", "max_output_tokens": 4}
        self.response = client.responses.create(
            input=LONG, metadata={"name": "river"}, extra_body={"thaw": {"branch": "river", "note": SECRET}}, **ask
        )
        self.loose = client.responses.create(input=LONG, store=False, **ask)
        self.conversation = client.conversations.create(
            items=[{"role": "user", "content": LONG}], metadata={"name": "river"}
        )
        client.responses.create(input="x", conversation=self.conversation.id, **ask)
        gateway.repo.within("a").tag("stone", "river")
        self.points = [self.response.thaw["point"], self.loose.thaw["point"]]

    @property
    def names(self) -> list[str]:
        commits = [point[:length] for point in self.points for length in (7, 11, 15, 20, 67)]
        return ["river", "stone", f"conversations/{self.conversation.id}", *self.points, *commits]


def tries(mine: Mine) -> list[Try]:
    """Those that the owner can make: each reaches something."""
    key, conversation = mine.response.id, mine.conversation.id
    found: list[Try] = [
        ("GET", f"responses/{key}", None),
        ("GET", f"responses/{key}?stream=true&starting_after=0", None),
        ("GET", f"responses/{key}/input_items", None),
        ("GET", f"conversations/{conversation}", None),
        ("GET", f"conversations/{conversation}/items", None),
        ("POST", "responses", {"input": "x", "max_output_tokens": 1, "previous_response_id": key}),
        ("POST", "responses", {"input": "x", "max_output_tokens": 1, "conversation": conversation}),
        ("POST", f"conversations/{conversation}", {"metadata": {"name": "river"}}),
    ]
    for name in mine.names:
        for point in (name, f"{name}:turn=1", f"{name}:token=3"):
            found.append(("POST", "responses", {"input": "x", "max_output_tokens": 1, "thaw": {"point": point}}))
    return found


def crafted(rng: random.Random, mine: Mine) -> Iterator[Try]:
    """As `tries`, bent: other ids, other spellings, other places to say them."""
    known = [*mine.names, mine.response.id, mine.loose.id, mine.conversation.id]
    spell: list[Callable[[str], str]] = [
        lambda s: s, lambda s: f"@a/{s}", lambda s: f"a/{s}", lambda s: f"../a/{s}", lambda s: f"%40a%2F{s}",
        lambda s: s.upper(), lambda s: s + " ", lambda s: s + "\x00", lambda s: s[:-1], lambda s: f"{s}~0",
        lambda s: f"{s}@{{0}}", lambda s: f"refs/{s}", lambda s: f"' OR namespace='a' OR id='{s}", lambda s: f"{s}%",
        lambda s: "".join(rng.choice(HEX) if one in HEX and rng.random() < 0.1 else one for one in s),
    ]  # fmt: skip
    while True:
        name = rng.choice(spell)(rng.choice(known))
        path = quote(name, safe=rng.choice(("", "/@:~{}")))
        small: dict[str, Any] = {"max_output_tokens": 1}
        yield rng.choice(
            [
                ("GET", f"responses/{path}", None),
                ("GET", f"responses/{path}?stream=true&starting_after={rng.randrange(9)}", None),
                ("GET", f"responses/{path}/input_items?after={path}", None),
                ("DELETE", f"responses/{path}", None),
                ("POST", f"responses/{path}/cancel", {}),
                ("GET", f"conversations/{path}", None),
                ("GET", f"conversations/{path}/items", None),
                ("DELETE", f"conversations/{path}", None),
                ("POST", f"conversations/{path}", {"metadata": {"a": "b"}}),
                ("POST", "responses", {**small, "input": "x", "previous_response_id": name}),
                ("POST", "responses", {**small, "input": "x", "conversation": name}),
                ("POST", "responses", {**small, "input": "x", "thaw": {"point": name}}),
                ("POST", "responses", {**small, "input": "x", "thaw": {"point": name, "policy": "recompute"}}),
                ("GET", f"models/{path}", None),
            ]
        )


def of_text(rng: random.Random) -> Iterator[Try]:
    """The other tenant's very words, or their beginnings: nothing of them is known, however they are sent."""
    while True:
        text = LONG[: rng.randrange(20, len(LONG))]
        hints = {"prompt_cache_key": "river", "user": "a", "metadata": {"namespace": "a"}}
        message = {"role": "user", "content": text}
        yield rng.choice(
            [
                ("POST", "chat/completions", {"messages": [message], "max_tokens": 1, **hints}),
                ("POST", "completions", {"prompt": text, "max_tokens": 1, **hints}),
                ("POST", "messages", {"messages": [message], "max_tokens": 1, "metadata": {"user_id": "a"}}),
                ("POST", "responses", {"input": text, "max_output_tokens": 1, **hints}),
            ]
        )


def send(client: httpx.Client, one: Try) -> httpx.Response:
    method, path, body = one
    return client.request(method, f"/v1/{path}", content=None if body is None else json.dumps(body))


def client_of(gateway: Gateway, key: str) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}", "x-session-id": "river", "x-thaw-tenant": "a"}
    return httpx.Client(base_url=gateway.url, headers=headers, timeout=60, trust_env=False)


@pytest.mark.slow("ten thousand requests")
def test_ten_thousand_tries_reach_match_and_tell_nothing(start: Start) -> None:
    gateway = start(tenants=two())
    mine, rng = Mine(gateway), random.Random(7)
    with client_of(gateway, "key-a") as owner, client_of(gateway, "key-b") as other:
        for one in tries(mine):
            assert send(owner, one).status_code == 200, one
        before = gateway.repo.within("a").branches()
        given = crafted(rng, mine)
        made = [*tries(mine), *(next(given) for _ in range(NUM_TRIES - len(tries(mine))))]

        ids = [*mine.points, mine.response.id, mine.loose.id, mine.conversation.id]

        def attempt(one: Try) -> None:
            reply = send(other, one)
            assert reply.status_code in (400, 404, 405), (one, reply.status_code, reply.text[:300])
            assert "secret" not in reply.text
            assert all(id not in reply.text or id in unquote(str(one)) for id in ids), one

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(attempt, made))
        assert gateway.repo.within("a").branches() == before
        for one in tries(mine)[:5]:
            assert send(owner, one).status_code == 200
        assert gateway.repo.within("b").branches() == [] == list(gateway.repo.within("b").store.commits())


def test_the_words_of_another_are_nobodys(start: Start) -> None:
    """Counts of cached tokens, of a tenant that sends another's texts, are those of a repository of its own."""
    gateway, alone = start(tenants=two()), start(tenants=two(), name="alone")
    Mine(gateway)
    given = of_text(random.Random(3))
    with client_of(gateway, "key-b") as here, client_of(alone, "key-b") as there:
        for _ in range(120):
            one = next(given)
            counts = [counted(send(client, one).json()) for client in (here, there)]
            assert counts[0] == counts[1], one
    stored = [one.service.ledger.nbytes("b") for one in (gateway, alone)]
    assert abs(stored[0] - stored[1]) < 500 < min(stored) / 100  # seeds have more or fewer digits


def counted(reply: dict[str, Any]) -> dict[str, Any]:
    return {"usage": reply["usage"], **{name: reply["thaw"][name] for name in ("cached_tokens", "source")}}
