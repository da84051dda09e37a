"""`thaw engine drain`: a gateway stops taking requests, and every session of its engines has a point."""

from __future__ import annotations

from typing import Any

import click

from thaw.cli import admin, options, output, words

EXAMPLE = """
thaw engine drain
thaw engine drain http://127.0.0.1:8790 --timeout 120 --json
thaw engine drain --undo
"""
MARGIN_S = 30.0
"""What an answer may take beyond the limit."""
INCOMPLETE = 8
"""As `Stopped`: the time limit ran out, or a session cannot be captured."""


@options.verb("drain", EXAMPLE)
@click.argument("url", required=False)
@click.option("--timeout", "timeout_s", type=options.Number(min=0.1, max=86_400), default=60.0, show_default=True,
              metavar="SECONDS", help="Time for all sessions together.")  # fmt: skip
@click.option("--undo", is_flag=True, help="Accept requests again, and resume those that were parked.")
@admin.key
@options.as_json
def drain(named: str | None, url: str | None, timeout_s: float, undo: bool, key: str | None, as_json: bool) -> int:
    """Stop a gateway from taking requests, and store every session of its engines, at a token boundary.

    URL is the address of a `thaw serve`; default: http://127.0.0.1:8790. The key must be an operator's: --api-key, else
    THAW_SERVE_TOKEN or THAW_API_KEY. Running responses are parked, and engines and weights may then be replaced. The
    gateway continues after --undo, or with `thaw serve --restore`.

    Exit code 8: not every session was captured; the output names them.
    """
    del named  # the gateway's repository
    where = url or admin.DEFAULT_URL
    told = admin.ask(where, "drain", None if undo else {"timeout_s": timeout_s}, timeout_s + MARGIN_S, key)
    if as_json:
        output.print_json({"url": where, **told})
    elif undo:
        output.line(f"{where} takes requests again; {words.count(told['resumed'], 'parked response')} resumed")
    else:
        _print(where, told)
    return 0 if undo or told["complete"] else INCOMPLETE


def print_sessions(told: dict[str, Any]) -> None:
    for one in told["sessions"]:
        place = f"  {one['namespace']}" if one["namespace"] else ""
        output.line(f"{output.style(one['point'][3:15], 'yellow')}  {one['was'].ljust(7)} "
                    f"{words.count(one['num_tokens'], 'token')}{place}")  # fmt: skip


def _print(where: str, told: dict[str, Any]) -> None:
    print_sessions(told)
    for one in told["missed"]:
        output.line(output.style(f"not captured: {one['why']}", "red"))
    output.line(f"{where} is drained: {words.count(len(told['sessions']), 'session')} stored, "
                f"{words.count(len(told['parked']), 'response')} parked, {words.seconds(told['seconds'])}")  # fmt: skip
