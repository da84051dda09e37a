"""What an operator does with a gateway's accelerators: free them for others, and take them back.

Requests that run are parked, every open session is stored, and the engines sleep by their own sleep mode. All engines
sleep or none: where one cannot, the others are woken and the gateway goes on. `wake` loads the sessions and resumes
what was parked. For operators' keys.
"""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from thaw.core.errors import EngineDied, ThawError
from thaw.gateway.context import GatewayContext
from thaw.gateway.dialects import responses
from thaw.gateway.draining import SHARE, require_operator
from thaw.gateway.engines import ServingEngine
from thaw.gateway.problems import ApiError, invalid, told
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
    """All, or none. Where one cannot be woken again, the gateway is asleep until `wake`."""
    if service.draining or service.closing:
        raise ApiError(409, "the gateway is drained or asleep already, or stopping", code="drained")
    service.lie_down(True)
    try:
        return await _sleep_all(service, asked, started)
    except BaseException:
        if not (await _wake_all(service)).stuck:
            service.lie_down(False)
            await responses.restore(service)
        raise


async def _sleep_all(service: Service, asked: SleepAsked, started: float) -> list[SleepReport]:
    late = await service.park_all(asked.timeout_s * SHARE)
    if late:
        raise ApiError(409, f"{len(late)} requests did not stop within {asked.timeout_s * SHARE:g} s", code="busy")
    if not await service.engines.settle(_left(asked, started)):
        raise ApiError(409, "an engine that was down is being booted; ask again when it is up", code="busy")
    return [
        await call(one.repo.sync.sleep, level=asked.level, timeout_s=_left(asked, started))
        for one in service.engines.up
    ]


def _left(asked: SleepAsked, started: float) -> float:
    return max(0.05, asked.timeout_s - (time.monotonic() - started))


async def wake(context: GatewayContext, request: Request, body: bytes) -> Response:
    """DELETE /admin/sleep"""
    require_operator(context)
    service, started = context.service, time.monotonic()
    with service.moving():
        if not service.asleep:
            raise ApiError(409, "the gateway does not sleep", code="awake")
        woken = await _wake_all(service)
        if woken.stuck:
            raise woken.stuck[0]
        service.lie_down(False)
        resumed = await responses.restore(service)
    return as_json(
        {
            "asleep": False,
            "loaded": woken.loaded,
            "missed": woken.missed,
            "resumed": resumed,
            "seconds": time.monotonic() - started,
        }
    )


class _Woken(msgspec.Struct):
    """`missed`: what is not there, by name. `stuck`: what engines raised that sleep on."""

    loaded: int = 0
    missed: list[dict[str, str]] = msgspec.field(default_factory=list)
    stuck: list[ThawError | ApiError] = msgspec.field(default_factory=list)


async def _wake_all(service: Service) -> _Woken:
    """Each that sleeps, whatever becomes of the others. One that is gone is taken out, and brought back later."""
    woken = _Woken()
    for one in [one for one in service.engines.up if one.repo.sync.is_asleep]:
        try:
            report = await call(one.repo.sync.wake)
        except Exception as error:  # noqa: BLE001 - the others wake all the same
            problem = told(error, f"the wake of engine {one.number}")
            if await _is_gone(service, one, problem):
                woken.missed.append({"namespace": "", "why": f"engine {one.number} is gone: {problem}"})
            else:
                woken.stuck.append(problem)
        else:
            woken.loaded += report.num_loaded
            woken.missed += [{"namespace": lost.namespace, "why": lost.why} for lost in report.missed]
    return woken


async def _is_gone(service: Service, one: ServingEngine, problem: ThawError | ApiError) -> bool:
    """Whether it does not even answer any more."""
    life = one.life
    if isinstance(problem, EngineDied):
        await service.engines.failed(one, life, problem)
    return one.life is not life or not one.is_up
