"""`thaw engine sleep` and `wake`: a gateway's engines free their accelerators, and take them back."""

from __future__ import annotations

from typing import Any

import click

from thaw.cli import admin, options, output, words
from thaw.cli.verbs.engine_drain import INCOMPLETE, MARGIN_S, print_sessions

SLEEP_EXAMPLE = """
thaw engine sleep
thaw engine sleep http://127.0.0.1:8790 --level 2 --json
"""
WAKE_EXAMPLE = """
thaw engine wake
thaw engine wake http://127.0.0.1:8790 --json
"""
WAKE_S = 600.0


@options.verb("sleep", SLEEP_EXAMPLE)
@click.argument("url", required=False)
@click.option("--level", type=click.IntRange(1, 2), default=1, show_default=True,
              help="1: keep the weights in host memory; 2: drop them, and read them again.")  # fmt: skip
@click.option("--timeout", "timeout_s", type=options.Number(min=0.1, max=86_400), default=60.0, show_default=True,
              metavar="SECONDS", help="Time to store all sessions.")  # fmt: skip
@admin.key
@options.as_json
def sleep(named: str | None, url: str | None, level: int, timeout_s: float, key: str | None, as_json: bool) -> None:
    """Store every session of a gateway, and free the accelerators of its engines by their own sleep mode.

    URL is the address of a `thaw serve`; default: http://127.0.0.1:8790. Running responses are parked, and requests get
    503 until `thaw engine wake`. Where an engine cannot sleep, or a session cannot be stored, all engines stay awake. A
    program with an engine of its own calls repo.sleep().
    """
    del named  # the gateway's repository
    where = url or admin.DEFAULT_URL
    told = admin.ask(where, "sleep", {"level": level, "timeout_s": timeout_s}, timeout_s + WAKE_S, key)
    if as_json:
        output.print_json({"url": where, **told})
        return
    print_sessions(told)
    output.line(f"{where} is asleep: {words.count(len(told['sessions']), 'session')} stored, "
                f"{words.count(len(told['parked']), 'response')} parked, {words.seconds(told['seconds'])}")  # fmt: skip


@options.verb("wake", WAKE_EXAMPLE)
@click.argument("url", required=False)
@admin.key
@options.as_json
def wake(named: str | None, url: str | None, key: str | None, as_json: bool) -> int:
    """Wake a gateway's engines, load their sessions from the store, and resume the parked responses.

    URL is the address of a `thaw serve`; default: http://127.0.0.1:8790.

    Exit code 8: a session could not be loaded, or an engine is gone; the output names it.
    """
    del named  # the gateway's repository
    where = url or admin.DEFAULT_URL
    told: dict[str, Any] = admin.ask(where, "sleep", None, WAKE_S + MARGIN_S, key)
    if as_json:
        output.print_json({"url": where, **told})
        return INCOMPLETE if told["missed"] else 0
    for one in told["missed"]:
        output.line(output.style(f"not loaded: {one['why']}", "red"))
    output.line(f"{where} is awake: {words.count(told['loaded'], 'session')} loaded, "
                f"{words.count(told['resumed'], 'response')} resumed, {words.seconds(told['seconds'])}")  # fmt: skip
    return INCOMPLETE if told["missed"] else 0
