"""`thaw serve`: OpenAI's and Anthropic's APIs over the repository."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from thaw.cli import options, output, place, serving
from thaw.cli.serving import Starting
from thaw.core.errors import InvalidRequest

if TYPE_CHECKING:
    from thaw.gateway.settings import GatewaySettings
    from thaw.gateway.tenants import Tenants

EXAMPLE = """
thaw serve
thaw serve --engine http://localhost:8000 --keys keys.json --audit audit.log
thaw serve --engine http://gpu1:8000 --engine http://gpu2:8000
thaw serve --engine vllm --model ~/models/Qwen3-8B --workers 2 --worker-env CUDA_VISIBLE_DEVICES=0 \\
    --worker-env CUDA_VISIBLE_DEVICES=1 -- --max-model-len 16384
OPENAI_BASE_URL=http://127.0.0.1:8790/v1 OPENAI_API_KEY=thaw-… python my_agent.py
"""
TOKEN = "THAW_SERVE_TOKEN"
DAY_S = 24 * 3600.0


@options.verb("serve", EXAMPLE)
@click.argument("arguments", nargs=-1, metavar="[-- ENGINE_ARGUMENTS...]")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8790, show_default=True, metavar="N")
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME",
              help="Another host name that clients may use; repeatable.")  # fmt: skip
@click.option("--keys", type=click.Path(), metavar="FILE",
              help=f"Tenants and their keys, as JSON, in a file of mode 0600. Without it, one key ({TOKEN} or a "
              "new one) gives access to the default namespace.")  # fmt: skip
@click.option("--model-name", "models", multiple=True, metavar="NAME",
              help="The model's name for clients; repeatable, * accepts any; default: its folder's name.")  # fmt: skip
@click.option("--tool-calls", "tools", default="none", show_default=True, metavar="KIND",
              help="How the model writes tool calls: hermes, vllm:NAME or sglang:NAME (NAME as in that engine's "
              "--tool-call-parser), or none (calls stay text).")  # fmt: skip
@click.option("--reasoning", default="none", show_default=True, metavar="KIND",
              help="How the model writes its thinking: think (<think>…</think>), vllm:NAME or sglang:NAME, or none "
              "(it stays text).")  # fmt: skip
@click.option("--audit", type=click.Path(), metavar="FILE", help="Write one line of JSON per request to FILE.")
@click.option("--certificate", type=click.Path(), metavar="FILE", help="PEM certificate; enables TLS.")
@click.option("--certificate-key", type=click.Path(), metavar="FILE", help="PEM key; default: in the certificate file.")
@click.option("--max-body", type=options.num_bytes, metavar="BYTES", help="Largest request body; default: 32MiB.")
@click.option("--max-requests", type=click.IntRange(1), metavar="N", help="Most requests at once; default: 1024.")
@click.option("--live-sessions", type=click.IntRange(0), metavar="N",
              help="Sessions to keep open for follow-up requests; default: 64.")  # fmt: skip
@click.option("--keep-days", type=options.Number(min=0), metavar="N",
              help="Days to keep responses on no branch or tag; default: 30.")  # fmt: skip
@click.option("--keep-bytes", type=options.num_bytes, metavar="BYTES",
              help="Most KV to keep for those responses; oldest deleted first; default: 64GiB.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1, 1024), metavar="N",
              help="Start N engines that run until the gateway stops. Arguments after -- go to each of their "
              "servers.")  # fmt: skip
@click.option("--worker-env", "environments", multiple=True, metavar="NAME=VALUE[,NAME=VALUE]",
              help="Environment of a worker: the first one is for worker 0, and so on; \\, is a comma.")  # fmt: skip
@click.option("--python", metavar="PATH", help="A Python interpreter with the engine and thaw, for workers and for "
              "vllm:NAME and sglang:NAME; default: the current one.")  # fmt: skip
@click.option("--arena", "arena_nbytes", type=options.num_bytes, metavar="BYTES",
              help="Host memory for each worker's sessions; default: 4GiB.")  # fmt: skip
@click.option("--spread", type=click.IntRange(1), metavar="N",
              help="Load a prefix in another engine if its own runs N requests more; default: 8.")  # fmt: skip
@click.option("--restore", is_flag=True, help="Resume the responses that the last gateway parked when it stopped.")
@options.engines
@options.as_json
def command(
    named: str | None,
    keys: str | None,
    engine_names: tuple[str, ...],
    workers: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Serve OpenAI's Responses, Chat Completions and Completions APIs and Anthropic's Messages API.

    Each response is a commit. A client can continue from any response, more than once, and after a restart.

    SIGTERM or ^C stops the gateway and commits what running requests have generated. docs/gateway.md lists what clients
    may send.
    """
    _require_installed()
    if place.namespace() is not None:
        raise InvalidRequest("the gateway serves the whole repository; assign namespaces to tenants with --keys")
    from thaw.gateway import server

    started = Starting(**{name: given.pop(name) for name in Starting.__struct_fields__})
    settings = _settings({**given, "parser_python": started.python})
    tenants, token = _tenants(keys)
    server.keep_audit(settings.audit)
    server.share_memory()
    with (
        serving.opened(named, engine_names, workers, started) as (repo, reconnect, others),
        server.opened(repo, tenants, settings, reconnect, others) as service,
    ):
        _say(settings, service.model, token, as_json)
        server.run(service)


def _require_installed() -> None:
    import importlib.util

    if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn")):
        raise InvalidRequest("`thaw serve` needs the extra [server]: pip install 'thaw-vllm[server]'")


def _tenants(keys: str | None) -> tuple[Tenants, str | None]:
    """Who may ask; and the key, where a new one was made."""
    from thaw.gateway import tenants

    if keys is not None:
        return tenants.load(Path(keys).expanduser()), None
    token = os.environ.get(TOKEN)
    if token:
        return tenants.single(token), None
    token = tenants.fresh_token()
    return tenants.single(token), token


def _settings(given: dict[str, Any]) -> GatewaySettings:
    from thaw.gateway.settings import GatewaySettings, Keeping, Limits

    limits = {"body_nbytes": "max_body", "requests": "max_requests", "live_sessions": "live_sessions"}
    days = given.pop("keep_days")
    keeping = {"lifetime_s": None if days is None else days * DAY_S, "nbytes": given.pop("keep_bytes")}
    return GatewaySettings(
        **_given({name: given.pop(name) for name in ("spread", "parser_python")}),
        limits=Limits(**_given({field: given.pop(option) for field, option in limits.items()})),
        keeping=Keeping(**_given(keeping)),
        **given,
    )


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _say(settings: GatewaySettings, model: str, token: str | None, as_json: bool) -> None:
    scheme = "https" if settings.certificate else "http"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"{scheme}://{host}:{settings.port}"
    if as_json:
        output.print_json({"url": url, "model": model, "token": token, "pid": os.getpid()})
    else:
        output.line(f"{model} at {output.style(url, 'bold')} (OpenAI: {url}/v1, Anthropic: {url})")
        output.line(f"sessions in a browser: {output.style(f'{url}/', 'bold')}")
        if token is not None:
            # Nothing follows it: it is copied into a browser.
            output.note(f"key for this run (set {TOKEN} to use your own): {token}")
    sys.stdout.flush()
