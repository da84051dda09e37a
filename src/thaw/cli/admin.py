"""What an operator asks of a gateway that runs: its address, the key, and what it answers."""

from __future__ import annotations

import json
import os
from typing import Any

from thaw.cli import options

TOKEN = "THAW_SERVE_TOKEN"
DEFAULT_URL = "http://127.0.0.1:8790"
key = options.option_of(
    "Engine", "--api-key", "key", metavar="KEY",
    help=f"An operator's key of the gateway. Other users can see command lines: prefer the variable {TOKEN}.",
)  # fmt: skip


def ask(url: str, what: str, body: dict[str, Any] | None, timeout_s: float, key: str | None = None) -> dict[str, Any]:
    """What the gateway answers; `body` None takes it back. Raises `EngineDied`, `InvalidRequest`, `Conflict`."""
    import httpx

    from thaw.core.errors import Conflict, EngineDied, InvalidRequest
    from thaw.engines.keys import VARIABLE

    shown = key or os.environ.get(TOKEN) or os.environ.get(VARIABLE)
    headers = {"Authorization": f"Bearer {shown}"} if shown else {}
    try:
        answer = httpx.request(
            "DELETE" if body is None else "POST", f"{url.rstrip('/')}/admin/{what}", headers=headers,
            content=None if body is None else json.dumps(body), timeout=timeout_s,
        )  # fmt: skip
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise InvalidRequest(f"{url!r} is not a gateway's address: {error}") from None
    except httpx.HTTPError as error:
        raise EngineDied(
            f"no gateway answers at {url}: {type(error).__name__}. Is `thaw serve` running there?"
        ) from None
    if answer.status_code in (404, 405):
        raise InvalidRequest(
            f"{url} is not a `thaw serve`. An engine's own server does not know sessions; their program does:  "
            "repo.drain() in that program"
        )
    if answer.status_code == 409:
        raise Conflict(f"{url}: {_said(answer)}")
    if answer.status_code == 401:
        why = f"the key is not known there ({_said(answer)})" if shown else "it asks for a key, and none was given"
        raise InvalidRequest(
            f"{url}: {why}. Set {TOKEN} to an operator's key, or give --api-key; `thaw serve` prints one when it starts"
        )
    if answer.status_code != 200:
        raise InvalidRequest(f"{url} answered {answer.status_code}: {_said(answer)}")
    told: dict[str, Any] = answer.json()
    return told


def _said(answer: Any) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(answer.text[:200])
