"""What an operator does with a whole gateway: drain it without ending it, and snapshot its engines while they work.

Drained: requests that run are parked, every open session has a point, none begins.

The call before a deploy and before a weight update. `undrain` resumes what was parked, as `thaw serve --restore` does;
a gateway that is stopped while it is drained has lost nothing either. For operators' keys.
"""

from __future__ import annotations

import time
from collections.abc import Sequence, Set
from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from thaw.gateway.context import GatewayContext
from thaw.gateway.dialects import responses
from thaw.gateway.job import ReplyJob
from thaw.gateway.problems import ApiError, invalid
from thaw.gateway.reply import as_json
from thaw.gateway.service import Service
from thaw.repo.bridge import call
from thaw.repo.drain import DEFAULT_TIMEOUT_S, MAX_TIMEOUT_S, DrainReport
from thaw.snapshot import EngineSnapshot, snapshot
from thaw.snapshot.take import DEFAULT_NAME

SHARE = 0.5
"""Of the time limit, for what runs to be parked; the rest is for what is open."""


class DrainAsked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=MAX_TIMEOUT_S)] = DEFAULT_TIMEOUT_S


async def drain(context: GatewayContext, request: Request, body: bytes) -> Response:
    """POST /admin/drain"""
    require_operator(context)
    try:
        asked = msgspec.json.decode(body or b"{}", type=DrainAsked)
    except msgspec.DecodeError as error:
        raise invalid("body", str(error)) from None
    with context.service.moving():
        return as_json(await drained(context.service, asked.timeout_s))


class SnapshotAsked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(max_length=200)] = DEFAULT_NAME
    replace: bool = False


async def taken(context: GatewayContext, request: Request, body: bytes) -> Response:
    """POST /admin/snapshot: while it works, one of each engine and namespace that has sessions. `lost`: requests that
    are in none of them."""
    require_operator(context)
    try:
        asked = msgspec.json.decode(body or b"{}", type=SnapshotAsked)
    except msgspec.DecodeError as error:
        raise invalid("body", str(error)) from None
    under_way, kept = context.service.under_way(), set[str]()
    found = []
    for one in context.service.engines.up:
        name = f"{asked.name}/{one.number}" if len(context.service.engines.all) > 1 else asked.name
        live = await call(one.repo.sync.live_sessions)
        for namespace in sorted({session.namespace for session in live}):
            repo = one.within(namespace).sync
            done = await call(snapshot, repo, name, replace=asked.replace)
            found.append(_told(namespace, one.number, done))
            kept |= {entry.session for entry in done.sessions}
            kept |= {entry.session for entry in done.missed}  # told there
    lost = _lost(context.service, under_way, kept)
    if not found and not lost:
        raise invalid("name", "no session is open; there is nothing to keep")
    return as_json({"snapshots": found, "lost": lost})


def _lost(service: Service, under_way: Sequence[tuple[ReplyJob, str]], kept: Set[str]) -> list[dict[str, Any]]:
    """Requests that were under way and are in no snapshot, by their ids: no session had their prompt yet."""
    names = {job: id for (_, id), job in service.jobs.items()}
    return [
        {"id": names.get(job), "request": job.request, "namespace": namespace, "why": "no session had its prompt yet"}
        for job, namespace in under_way
        if not job.task.done() and (job.session is None or job.session.sync.engine_ref not in kept)
    ]


def _told(namespace: str, engine: int, done: EngineSnapshot) -> dict[str, Any]:
    was = {name: len(done.of(name)) for name in ("running", "waiting", "parked", "idle")}
    missed = [{"why": one.why} for one in done.missed]
    return {"name": done.name, "namespace": namespace, "engine": engine, "commit": done.commit, **was, "missed": missed}


async def undrain(context: GatewayContext, request: Request, body: bytes) -> Response:
    """DELETE /admin/drain"""
    require_operator(context)
    service = context.service
    with service.moving():
        if service.asleep:
            raise ApiError(409, "the gateway is asleep; wake it (thaw engine wake)", code="asleep")
        was = service.draining
        for one in service.engines.all:
            await call(one.repo.sync.undrain)
        service.draining = False
        return as_json({"drained": False, "was": was, "resumed": await responses.restore(service) if was else 0})


def require_operator(context: GatewayContext) -> None:
    if not context.tenant.operator:
        raise ApiError(403, "this key is not an operator's")


async def drained(service: Service, timeout_s: float) -> dict[str, Any]:
    """Drain it; what was captured, and by name what was not. Raises `ApiError` 409 where it is drained already."""
    if service.draining or service.closing:
        raise ApiError(409, "the gateway is drained already, or stopping", code="drained")
    started = time.monotonic()
    service.draining = True
    late = await service.park_all(timeout_s * SHARE)
    reports = []
    for one in service.engines.up:
        left = max(0.05, timeout_s - (time.monotonic() - started))
        reports.append(await call(one.repo.sync.drain, timeout_s=left, why="the gateway is drained"))
    missed = [_missed(one.namespace, one.why) for report in reports for one in report.missed]
    missed += [_missed(name, f"a request did not stop within {timeout_s * SHARE:g} s") for name in late]
    rows = await call(service.ledger.with_status, "parked")
    return {
        "drained": True,
        "complete": not missed,
        "sessions": [one for report in reports for one in _sessions(report)],
        "parked": [{"id": row.id, "namespace": row.namespace, "point": row.point} for row in rows],
        "missed": missed,
        "seconds": time.monotonic() - started,
    }


def _sessions(report: DrainReport) -> list[dict[str, Any]]:
    """The engine's names of sessions are nobody's business: points name them."""
    return [
        {"namespace": one.namespace, "point": one.point, "num_tokens": one.num_tokens, "was": one.was}
        for one in report.points
    ]


def _missed(namespace: str, why: str) -> dict[str, Any]:
    return {"namespace": namespace, "why": why}
