"""`thaw up`: start an engine as a server that the verbs of this repository then join."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from thaw.cli import options, output, place, words
from thaw.cli.progress import Progress

if TYPE_CHECKING:
    from thaw.serve import Served

EXAMPLE = """
thaw up --engine vllm --model ~/models/Qwen3-0.6B
thaw up --engine vllm --model ~/models/Qwen3-8B --port 8000 -- --tensor-parallel-size 2
thaw up --engine sglang --model ~/models/Qwen3-8B -- --page-size 16
thaw down
"""
ENGINE_HELP = "An engine that has a server. Default: the one that the repository remembers, else vllm."


@options.verb("up", EXAMPLE)
@click.argument("arguments", nargs=-1, metavar="[-- ENGINE_ARGUMENTS...]")
@click.option("--engine", "engine_name", metavar="NAME", help=ENGINE_HELP)
@click.option("--model", metavar="PATH", help="A folder or hub id; default: the one the repository remembers.")
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help="Port to listen on; default: a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on.")
@click.option(
    "--python", metavar="PATH", help="A Python interpreter with the engine and thaw; default: the current one."
)
@click.option("--arena", type=options.num_bytes, metavar="BYTES", help="Host memory for sessions; default: 4GiB.")
@click.option(
    "--timeout", "timeout_s", type=options.Number(min=0, min_open=True), default=900, show_default=True, metavar="S"
)
@options.as_json
def command(
    named: str | None,
    arguments: tuple[str, ...],
    engine_name: str | None,
    model: str | None,
    port: int | None,
    host: str,
    python: str | None,
    arena: int | None,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Start a stock engine server (vllm, sglang) in the background, with thaw loaded.

    Until `thaw down`, the verbs of this repository join that server instead of loading the model each time. Arguments
    after -- go to the engine. The log is engine.log in the repository; the five previous logs are engine.log.1 (newest)
    to engine.log.5.
    """
    from thaw import serve

    serve.require_keys(arguments)
    with place.open_repository(named) as repo, options.has_server():
        started = serve.up(
            repo, engine_name, model, host=host, port=port, python=python, arena_nbytes=arena, timeout_s=timeout_s,
            arguments=arguments, shown=Progress,
        )  # fmt: skip
    _say(started.record, started.seconds, as_json)


def _say(record: Served, seconds: float, as_json: bool) -> None:
    if as_json:
        fields = ("engine", "url", "model", "pid", "log", "config", "mail")
        output.print_json({**{name: getattr(record, name) for name in fields}, "seconds": seconds})
        return
    output.line(f"{record.engine} is up at {output.style(record.url, 'bold')} (process {record.pid}) after "
                f"{words.seconds(seconds)}")  # fmt: skip
    output.note(f"log: {record.log}. The verbs of this repository join this server; `thaw down` stops it.")
