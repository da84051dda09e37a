"""What can be seen of a server from outside, with the standard library alone: whose it is, and whether thaw is active.

An engine may go on when a plug-in fails to load, so that thaw works in it is not assumed: each of an engine's processes
leaves a note about itself in the mail folder, and all of them must be there.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from thaw.core.errors import InvalidRequest
from thaw.core.findings import Finding
from thaw.data.files import read_at_most
from thaw.engines.served import protocol
from thaw.engines.served.mailbox import Mailbox, ranks_beside
from thaw.engines.served.protocol import EngineFacts

ASK_LIMIT_S = 5.0
HELLO_LIMIT_S = 60.0
MAX_SAID_NBYTES = 1 << 16
MAX_REPLY_NBYTES = 1 << 20


def base(url: str) -> str:
    """The server's address, given with or without /v1."""
    return url.rstrip("/").removesuffix("/v1")


def get(url: str, key: str | None) -> bytes:
    """The beginning of what is said there; nothing where nobody says anything in a few seconds."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=_bearer(key)), timeout=ASK_LIMIT_S) as reply:
            return bytes(reply.read(MAX_SAID_NBYTES))
    except (urllib.error.URLError, OSError, ValueError):
        return b""


def post(url: str, body: Mapping[str, Any], key: str | None) -> bytes:
    """The reply to a JSON body. Raises OSError, ValueError."""
    headers = {"Content-Type": "application/json", **_bearer(key)}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=HELLO_LIMIT_S) as reply:
        return read_at_most(reply, MAX_REPLY_NBYTES, f"the reply of {url}")


def _bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def joined(url: str, mail_at: Callable[[str], str], switched_on_by: str) -> Iterator[Finding]:
    """A server that somebody else started: asked itself, for that it answers says nothing about thaw.

    `mail_at` asks it for its mail folder ("": thaw is not active); raises OSError, ValueError or MsgspecError."""
    what = f"the server at {url}, which this repository joins,"
    try:
        mail = mail_at(url)
    except InvalidRequest as error:
        yield Finding(name="server", status="problem", text=f"{what} cannot be asked: {error}")
        return
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
            advice=f"Start it with {switched_on_by}.",
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


def active_in(mail: Path, log: str) -> Iterator[Finding]:
    """Whether thaw is active in the engines that use this mail folder."""
    for folder in _folders(mail):
        yield from _active(folder, log)


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
    mail = Mailbox(folder)
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
