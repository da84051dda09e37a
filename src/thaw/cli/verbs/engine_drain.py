"""`thaw engine drain`: a gateway stops taking requests, and every session of its engines has a point."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from thaw.cli import options, output, words

EXAMPLE = """
thaw engine drain
thaw engine drain http://127.0.0.1:8790 --timeout 120 --json
thaw engine drain --undo
"""
TOKEN = "THAW_SERVE_TOKEN"
DEFAULT_URL = "http://127.0.0.1:8790"
MARGIN_S = 30.0
"""What an answer may take beyond the limit."""
INCOMPLETE = 8
"""As `Stopped`: the time limit ran out, or a session cannot be captured."""


@options.verb("drain", EXAMPLE)
@click.argument("url", required=False)
@click.option("--timeout", "timeout_s", type=options.Number(min=0.1, max=86_400), default=60.0, show_default=True,
              metavar="SECONDS", help="Time for all sessions together.")  # fmt: skip
@click.option("--undo", is_flag=True, help="Let requests begin again, and resume those that were parked.")
@options.option_of("Engine", "--api-key", "key", metavar="KEY",
                   help="An operator's key of the gateway. Other users can see command lines: prefer the variable "
                   f"{TOKEN}.")  # fmt: skip
@options.as_json
def drain(named: str | None, url: str | None, timeout_s: float, undo: bool, key: str | None, as_json: bool) -> int:
    """Stop a gateway from taking requests, and store every session of its engines, at a token boundary.

    URL is the address of a `thaw serve`; default: http://127.0.0.1:8790. The key must be an operator's: --api-key, else
    THAW_SERVE_TOKEN or THAW_API_KEY. Running responses are parked, and engines and weights may then be replaced. The
    gateway goes on after --undo, or with `thaw serve --restore`.

    Exit code 8: not every session was captured; the output names them.
    """
    del named  # the gateway's repository
    where = url or DEFAULT_URL
    told = ask(where, None if undo else {"timeout_s": timeout_s}, timeout_s, key)
    if as_json:
        output.print_json({"url": where, **told})
    elif undo:
        output.line(f"{where} takes requests again; {words.count(told['resumed'], 'parked response')} resumed")
    else:
        _print(where, told)
    return 0 if undo or told["complete"] else INCOMPLETE


def ask(url: str, body: dict[str, Any] | None, timeout_s: float, key: str | None = None) -> dict[str, Any]:
    """What the gateway answers; `body` None takes the drain back. Raises `EngineDied`, `InvalidRequest`, `Conflict`."""
    import httpx

    from thaw.core.errors import Conflict, EngineDied, InvalidRequest
    from thaw.engines.keys import VARIABLE

    shown = key or os.environ.get(TOKEN) or os.environ.get(VARIABLE)
    headers = {"Authorization": f"Bearer {shown}"} if shown else {}
    try:
        answer = httpx.request(
            "DELETE" if body is None else "POST", f"{url.rstrip('/')}/admin/drain", headers=headers,
            content=None if body is None else json.dumps(body), timeout=timeout_s + MARGIN_S,
        )  # fmt: skip
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise InvalidRequest(f"{url!r} is not a gateway's address: {error}") from None
    except httpx.HTTPError as error:
        raise EngineDied(
            f"no gateway answers at {url}: {type(error).__name__}. Is `thaw serve` running there?"
        ) from None
    if answer.status_code in (404, 405):
        raise InvalidRequest(
            f"{url} is not a `thaw serve`. An engine's own server does not know sessions; whoever holds them does: "
            "repo.drain() in that program"
        )
    if answer.status_code == 409:
        raise Conflict(f"{url}: {_said(answer)}")
    if answer.status_code != 200:
        raise InvalidRequest(f"{url} answered {answer.status_code}: {_said(answer)}")
    told: dict[str, Any] = answer.json()
    return told


def _said(answer: Any) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(answer.text[:200])


def _print(where: str, told: dict[str, Any]) -> None:
    for one in told["sessions"]:
        place = f"  {one['namespace']}" if one["namespace"] else ""
        output.line(f"{output.style(one['point'][3:15], 'yellow')}  {one['was'].ljust(7)} "
                    f"{words.count(one['num_tokens'], 'token')}{place}")  # fmt: skip
    for one in told["missed"]:
        output.line(output.style(f"not captured: {one['why']}", "red"))
    output.line(f"{where} is drained: {words.count(len(told['sessions']), 'session')} stored, "
                f"{words.count(len(told['parked']), 'response')} parked, {words.seconds(told['seconds'])}")  # fmt: skip
