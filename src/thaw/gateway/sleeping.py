"""What an operator does with a gateway's accelerators: free them for others, and take them back.

Requests that run are parked, every open session is stored, and the engines sleep by their own sleep mode. All engines
sleep or none: where one cannot, the others are woken and the gateway goes on. `wake` loads the sessions and resumes
what was parked. For operators' keys.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from thaw.gateway.context import GatewayContext
from thaw.gateway.dialects import responses
from thaw.gateway.draining import SHARE, require_operator
from thaw.gateway.problems import ApiError, invalid
from thaw.gateway.reply import as_json
from thaw.gateway.service import Service
from thaw.repo.bridge import call
from thaw.repo.drain import DEFAULT_TIMEOUT_S, MAX_TIMEOUT_S
from thaw.repo.sleep import SleepReport


class SleepAsked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Annotated[int, msgspec.Meta(ge=1, le=2)] = 1
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=MAX_TIMEOUT_S)] = DEFAULT_TIMEOUT_S


async def sleep(context: GatewayContext, request: Request, body: bytes) -> Response:
    """POST /admin/sleep"""
    require_operator(context)
    try:
        asked = msgspec.json.decode(body or b"{}", type=SleepAsked)
    except msgspec.DecodeError as error:
        raise invalid("body", str(error)) from None
    service, started = context.service, time.monotonic()
    with service.moving():
        reports = await _lie_down(service, asked, started)
    rows = await call(service.ledger.with_status, "parked")
    return as_json(
        {
            "asleep": True,
            "level": asked.level,
            "sessions": [
                {"namespace": one.namespace, "point": one.point, "num_tokens": one.num_tokens, "was": one.was}
                for report in reports
                for one in report.points
            ],
            "parked": [{"id": row.id, "namespace": row.namespace, "point": row.point} for row in rows],
            "seconds": time.monotonic() - started,
        }
    )


async def _lie_down(service: Service, asked: SleepAsked, started: float) -> list[SleepReport]:
    """All, or none."""
    if service.draining or service.closing:
        raise ApiError(409, "the gateway is drained or asleep already, or stopping", code="drained")
    service.draining = service.asleep = True
    try:
        return await _sleep_all(service, asked, started)
    except BaseException:
        await _wake_all(service)
        service.draining = service.asleep = False
        await responses.restore(service)
        raise


async def _sleep_all(service: Service, asked: SleepAsked, started: float) -> list[SleepReport]:
    late = await service.park_all(asked.timeout_s * SHARE)
    if late:
        raise ApiError(409, f"{len(late)} requests did not stop within {asked.timeout_s * SHARE:g} s", code="busy")
    reports = []
    for one in service.engines.up:
        left = max(0.05, asked.timeout_s - (time.monotonic() - started))
        reports.append(await call(one.repo.sync.sleep, level=asked.level, timeout_s=left))
    return reports


async def wake(context: GatewayContext, request: Request, body: bytes) -> Response:
    """DELETE /admin/sleep"""
    require_operator(context)
    service, started = context.service, time.monotonic()
    with service.moving():
        if not service.asleep:
            raise ApiError(409, "the gateway does not sleep", code="awake")
        told = await _wake_all(service)
        service.draining = service.asleep = False
        resumed = await responses.restore(service)
    return as_json({"asleep": False, **told, "resumed": resumed, "seconds": time.monotonic() - started})


async def _wake_all(service: Service) -> dict[str, Any]:
    """Those that sleep; what was loaded, and what was not, by name."""
    loaded, missed = 0, []
    for one in service.engines.all:
        if one.repo.sync.is_asleep:
            report = await call(one.repo.sync.wake)
            loaded += report.num_loaded
            missed += [{"namespace": lost.namespace, "why": lost.why} for lost in report.missed]
    return {"loaded": loaded, "missed": missed}
