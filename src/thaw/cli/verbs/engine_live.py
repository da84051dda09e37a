"""`thaw engine stats` and `thaw engine switch`: look into an engine that runs, and turn thaw off in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from thaw.cli import boot, options, output, words
from thaw.core.errors import Unsupported

if TYPE_CHECKING:
    from thaw.engines.base import Engine

STATS_EXAMPLE = """
thaw engine stats
thaw engine stats http://localhost:8000 --json
"""
SWITCH_EXAMPLE = """
thaw engine switch off
thaw engine switch on http://localhost:8000
"""


@options.verb("stats", STATS_EXAMPLE)
@click.argument("url", required=False)
@options.api_key
@options.as_json
def stats(named: str | None, url: str | None, as_json: bool) -> None:
    """Print a running engine's counters: sessions, blocks (free, pinned), captures, hydrates, refusals, bytes held.

    URL is the server's address; default: the one that the repository remembers.
    """
    with _joined(named, url) as engine:
        counts: dict[str, int] = engine.stats()  # type: ignore[attr-defined]
    if as_json:
        output.print_json(counts)
        return
    output.rows([(name, _shown(name, value)) for name, value in counts.items()])


@options.verb("switch", SWITCH_EXAMPLE)
@click.argument("state", type=click.Choice(["on", "off"]))
@click.argument("url", required=False)
@options.api_key
@options.as_json
def switch(named: str | None, state: str, url: str | None, as_json: bool) -> None:
    """Turn thaw off in a running engine, or on again, without a restart.

    While thaw is off, its requests are refused and all pins end. Ordinary requests are not affected. Sessions stay in
    the engine and can continue once thaw is on again.
    """
    with _joined(named, url) as engine:
        engine.switch(on=state == "on")  # type: ignore[attr-defined]
        where = str(engine.options.get(boot.URL, ""))
    if as_json:
        output.print_json({"url": where, "on": state == "on"})
        return
    output.line(f"thaw is {state} in the engine at {where}")


def _joined(named: str | None, url: str | None) -> Engine:
    """The engine that runs there. Raises `Unsupported` where one would have to be loaded first."""
    chosen = boot.choose_anywhere(named, url, None)
    if boot.URL not in chosen.options:
        raise Unsupported(
            f"{boot.label(chosen)} is loaded again by each verb; only a running engine has counters and a switch. "
            "Give a server's URL, or start one: thaw up"
        )
    engine = boot.boot(chosen)
    if not hasattr(engine, "switch"):
        engine.close()
        raise Unsupported(f"the {engine.info.name} engine has no counters and no switch")
    return engine


def _shown(name: str, value: int) -> str:
    return words.nbytes(value) if name.endswith("nbytes") else f"{value:,}"
