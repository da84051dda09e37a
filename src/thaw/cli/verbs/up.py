"""`thaw up`: start an engine as a server that the verbs of this repository then join."""

from __future__ import annotations

import socket
import sys
import time
from typing import TYPE_CHECKING

import click

from thaw.cli import boot, options, output, place, words
from thaw.cli.progress import Progress
from thaw.core.errors import Busy, InvalidRequest
from thaw.serve import command as serving
from thaw.serve import process as server

if TYPE_CHECKING:
    import subprocess

    from thaw.repo.settings import EngineSettings
    from thaw.serve.record import Served
    from thaw.store import Store

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
@click.option("--model", metavar="PATH", help="A folder or hub id; default: the one that the repository remembers.")
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help="Default: a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where it listens.")
@click.option("--python", metavar="PATH", help="The Python that has engine and thaw; default: the one that runs this.")
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
    """Start a stock server of an engine (vllm, sglang) in the background, with thaw in it. From then on the verbs of
    this repository join it instead of loading the model each time, until `thaw down`.

    What stands after -- are the engine's own arguments. Its log is engine.log in the repository; those of the five
    servers before are engine.log.1 (the last) to engine.log.5.
    """
    from thaw.engines.kind import Wanted
    from thaw.serve import record as served

    interpreter = python or sys.executable
    serving.require_keys(arguments)
    with place.open_repository(named) as repo:
        _refuse_second(repo.store)
        chosen = _model(repo.store, engine_name, model)
        kind, path = serving.server_of(chosen.name), str(chosen.options["model"])
        serving.require(kind, interpreter, named_one=python is not None)
        port = _port(host, port)
        log = serving.log_of(repo.store)
        start = kind.start(
            Wanted(
                model=path,
                host=host,
                port=port,
                python=interpreter,
                folder=repo.path.resolve(),
                stores={repo.store.uuid: str(repo.store.packs.resolve())},
                arena_nbytes=arena,
                arguments=arguments,
            )
        )
        process = server.start(start.command, log, start.environment)
        record = served.Served(
            engine=chosen.name,
            url=f"http://{_reachable(host)}:{port}",
            model=path,
            pid=process.pid,
            born=served.born(process.pid),
            host=socket.gethostname(),
            log=str(log),
            config=start.config,
            mail=start.mail,
            started_ns=time.time_ns(),
            before=_before(repo.store),
        )
        seconds = _bring_up(repo.store, record, process, timeout_s, kind.log_prefix)
    _say(record, seconds, as_json)


def _refuse_second(store: Store) -> None:
    from thaw.serve import record as served

    known = served.recall(store)
    if known is not None and served.is_alive(known):
        what = f"{known.engine} is up already at {known.url} (process {known.pid}, {known.model})"
        raise Busy(f"{what}. End it first: thaw down")


def _model(store: Store, engine_name: str | None, model: str | None) -> EngineSettings:
    """The engine to start; a server that is gone does not count as the one that is remembered."""
    from thaw.engines.registry import DEFAULT_SERVER
    from thaw.repo.settings import EngineSettings, recall

    if engine_name is not None:
        options.server_of(engine_name)
    known = _before(store) or recall(store)
    name = engine_name or (known.name if known is not None and serving.has_server(known.name) else DEFAULT_SERVER)
    if model is None and known is not None and "model" in known.options:
        return EngineSettings(name=name, options={"model": known.options["model"]})
    return boot.choose(None, name, model)


def _before(store: Store) -> EngineSettings | None:
    """What the repository remembers besides servers."""
    from thaw.repo.settings import recall
    from thaw.serve import record as served

    known, old = recall(store), served.recall(store)
    if known is not None and boot.URL in known.options:
        return old.before if old is not None else None
    return known


def _port(host: str, port: int | None) -> int:
    if port is None:
        return server.free_port(host)
    if server.is_taken(host, port):
        raise InvalidRequest(f"port {port} is taken on {host}; name another, or none for a free one")
    return port


def _reachable(host: str) -> str:
    """How this machine reaches a server that listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _bring_up(
    store: Store, record: Served, process: subprocess.Popen[bytes], timeout_s: float, log_prefix: str
) -> float:
    """Seconds until it answered. It is written down before that, so that `thaw down` finds it whatever happens here."""
    from pathlib import Path

    from thaw.repo.settings import EngineSettings, remember
    from thaw.serve import record as served

    served.remember(store, record)
    try:
        seconds = server.wait(process, record.url, Path(record.log), timeout_s, log_prefix, Progress)
    except BaseException:
        served.remember(store, None)
        raise
    remember(store, EngineSettings(name=record.engine, options={boot.URL: record.url}))
    return seconds


def _say(record: Served, seconds: float, as_json: bool) -> None:
    if as_json:
        fields = ("engine", "url", "model", "pid", "log", "config", "mail")
        output.print_json({**{name: getattr(record, name) for name in fields}, "seconds": seconds})
        return
    output.line(f"{record.engine} is up at {output.style(record.url, 'bold')} (process {record.pid}) after "
                f"{words.seconds(seconds)}")  # fmt: skip
    output.note(f"its log: {record.log}. The verbs of this repository join it; `thaw down` ends it.")
