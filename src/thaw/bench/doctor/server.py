"""The server that the repository started or joined: whether it runs, answers, and has thaw active in every worker.

vLLM goes on when a plug-in fails to load, so that the connector works is not assumed: each of an engine's processes
leaves a note about itself in the mail folder, and all of them must be there.
"""

from __future__ import annotations

import json
import secrets
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from thaw.bench.doctor.report import Finding
from thaw.core.errors import InvalidRequest, ThawError
from thaw.data.files import read_at_most
from thaw.engines.keys import api_key
from thaw.engines.served import protocol
from thaw.engines.served.mail import Mail, ranks_beside
from thaw.engines.served.protocol import EngineFacts
from thaw.engines.sglang.client import wire
from thaw.repo import served, settings
from thaw.repo.served import Served
from thaw.store import Store

HELLO_LIMIT_S = 60.0
MAX_REPLY_NBYTES = 1 << 20
SWITCHED_ON_BY = {"sglang": "--radix-cache-backend thaw"}
WITH_A_FILE = "the file that `thaw engine config vllm` writes (--config FILE)"


def findings(folder: Path) -> Iterator[Finding]:
    """Nothing where no server was started or joined, or no repository is."""
    known, name, url = _recall(folder)
    if url and (known is None or known.url != url):
        for one in url.split(","):
            yield from _joined(name, one)
        return
    if known is None:
        return
    what = f"{known.engine} at {known.url} (process {known.pid}, {known.model})"
    if not served.is_alive(known):
        yield Finding(
            name="server",
            status="warning",
            text=f"{what} is gone",
            advice=f"Its log may say why: {known.log}. `thaw down` forgets it, `thaw up` starts one.",
        )
    elif not served.answers(known.url):
        yield Finding(
            name="server",
            status="warning",
            text=f"{what} runs and does not answer",
            advice=f"It may still be starting; its log: {known.log}",
        )
    else:
        yield Finding(name="server", status="ok", text=f"{what} is up and answers")
        yield from _connector(known)


def _recall(folder: Path) -> tuple[Served | None, str, str]:
    """The server that `thaw up` started; the engine that the verbs join, and its address ("": none)."""
    if not (folder / "thaw.db").is_file():
        return None, "", ""
    try:
        with Store.open(folder) as store:
            engine = settings.recall(store)
            name, options = (engine.name, engine.options) if engine is not None else ("", {})
            return served.recall(store), name, str(options.get("url", ""))
    except ThawError:
        return None, "", ""  # that the repository is damaged is fsck's to say


def _joined(engine: str, url: str) -> Iterator[Finding]:
    """A server that somebody else started: asked itself, for that it answers says nothing about thaw."""
    what = f"the server at {url}, which this repository joins,"
    try:
        api_key(engine)
    except InvalidRequest as error:
        yield Finding(name="server", status="problem", text=f"{what} cannot be asked: {error}")
        return
    try:
        mail = _mail_of_sglang(url) if engine == "sglang" else _mail_of_vllm(url)
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        yield Finding(
            name="server",
            status="warning",
            text=f"{what} does not answer: {error}",
            advice="Start it, or name another engine with --engine or --model.",
        )
        return
    yield Finding(name="server", status="ok", text=f"{what} is up and answers")
    if not mail:
        yield Finding(
            name="connector",
            status="problem",
            text=f"thaw is not active in the server at {url}",
            advice=f"Start it with {SWITCHED_ON_BY.get(engine, WITH_A_FILE)}.",
        )
    elif not (folders := _folders(Path(mail))):
        yield Finding(
            name="connector",
            status="problem",
            text=f"the mail folder of the server at {url}, {mail}, is not here",
            advice="Client and engine must share it: run on the same host, or mount it.",
        )
    else:
        for folder in folders:
            yield from _active(folder, "on its host")


def _mail_of_vllm(url: str) -> str:
    """The mail folder of the engine there; "" where thaw is not active. Raises OSError, or ValueError or
    MsgspecError for what is no such server."""
    message = protocol.Hello(id=secrets.token_hex(16))
    body = {"prompt": [0], "max_tokens": 1, "temperature": 0.0, "kv_transfer_params": protocol.params(message)}
    said = json.loads(_asked(f"{url}/v1/completions", body, "vllm"))
    answer = (said.get("kv_transfer_params") or {}).get(protocol.KEY) or {}
    return str((answer.get("facts") or {}).get("mail", ""))


def _mail_of_sglang(url: str) -> str:
    """Likewise."""
    said = msgspec.json.decode(_asked(f"{url}/generate", wire.hello(), "sglang"), type=wire.News)
    return wire.facts(said).get("mail", "")


def _asked(url: str, body: dict[str, Any], engine: str) -> bytes:
    key = api_key(engine)
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=HELLO_LIMIT_S) as reply:
        return read_at_most(reply, MAX_REPLY_NBYTES, f"the reply of {url}")


def _connector(known: Served) -> Iterator[Finding]:
    if known.is_here:
        for folder in _folders(Path(known.mail)):
            yield from _active(folder, known.log)


def _folders(mail: Path) -> list[Path]:
    """Where its engines keep their facts: a data-parallel server has a folder for each rank, in the one that it was
    started with. A server that was asked itself names the folder of the rank that answered."""
    if mail.name.startswith("dp") and (mail / "facts").is_dir():
        return [mail.parent / f"dp{rank}" for rank in ranks_beside(mail)] or [mail]
    ranks = [place for place in mail.glob("dp*") if place.name[2:].isdecimal() and (place / "facts").is_dir()]
    if ranks:
        return sorted(ranks, key=lambda place: int(place.name[2:]))
    return [mail] if (mail / "facts").is_dir() else []


def _active(folder: Path, log: str) -> Iterator[Finding]:
    """What the connector's processes said about themselves."""
    mail = Mail(folder)
    engine = mail.engine_facts()
    if engine is None:
        yield Finding(
            name="connector",
            status="problem",
            text=f"thaw is not active in {_rank(folder)}that server: its engine process left no note",
            advice=f"thaw must be installed where it runs; its log: {log}",
        )
        return
    workers = [facts for rank in range(engine.world_size) if (facts := mail.worker_facts(rank)) is not None]
    count = f"{len(workers)} of {engine.world_size}"
    runner = f"runner {engine.runner}, " if engine.runner else ""
    text = (
        f"thaw {engine.thaw} is active in {_rank(folder)}{engine.engine} {engine.version} and in {count} workers "
        f"({runner}{engine.num_blocks:,} blocks of {engine.block_size} tokens, {engine.dtype}, "
        f"prefix caching {'on' if engine.prefix_caching else 'off'})"
    )
    whole = len(workers) == engine.world_size
    layout = "; ".join(f"{k} {v}" for k, v in sorted(workers[0].layout.items())) if workers else ""
    groups = " | ".join(map(str, workers[0].groups)) if workers else ""
    yield Finding(
        name="connector",
        status="ok" if whole else "problem",
        text=f"{text}; cache groups: {groups}; layout: {layout}" if workers else text,
        advice="" if whole else _why_not(engine, log),
    )
    for note in engine.notes:
        yield Finding(name="connector-note", status="warning", text=note)


def _why_not(engine: EngineFacts, log: str) -> str:
    if engine.protocol != protocol.VERSION:
        return (
            f"It speaks version {engine.protocol} of thaw's protocol, this thaw {protocol.VERSION}: install the same "
            f"thaw on both sides (there: {engine.thaw}) and start the server again."
        )
    return f"Some workers did not load it; the server's log says why: {log}"


def _rank(folder: Path) -> str:
    return f"data-parallel rank {folder.name[2:]} of " if folder.name.startswith("dp") else ""
