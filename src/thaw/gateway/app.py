"""The web application: routes, and what is refused before a body is read.

Every request passes one door: its Host header names this gateway, its key is known, its body is there in time and not
too large. What goes wrong is answered in the words of the API that was asked. A line of the audit log says who asked
what, and what became of it; no key, prompt or answer is in any log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from thaw.gateway import draining, sleeping
from thaw.gateway.browser import routes as browser
from thaw.gateway.context import GatewayContext
from thaw.gateway.dialects import chat, completions, conversations, messages, models, responses
from thaw.gateway.job import REQUEST
from thaw.gateway.metrics import Gauges
from thaw.gateway.problems import ApiError, problem_of, told
from thaw.gateway.repeats import detached
from thaw.gateway.reply import ClientGone, as_json
from thaw.gateway.service import Service

audit = logging.getLogger("thaw.gateway.audit")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
Handler: TypeAlias = Callable[[GatewayContext, Request, bytes], Awaitable[Response]]
ANTHROPIC = "/v1/messages"
CREATING = ("/v1/responses", "/v1/chat/completions", "/v1/completions", "/v1/messages")

ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/v1/responses", responses.create),
    ("GET", "/v1/responses/{id}", responses.retrieve),
    ("DELETE", "/v1/responses/{id}", responses.delete),
    ("POST", "/v1/responses/{id}/cancel", responses.cancel),
    ("GET", "/v1/responses/{id}/input_items", responses.input_items),
    ("POST", "/v1/conversations", conversations.create),
    ("GET", "/v1/conversations/{id}", conversations.retrieve),
    ("POST", "/v1/conversations/{id}", conversations.update),
    ("DELETE", "/v1/conversations/{id}", conversations.delete),
    ("GET", "/v1/conversations/{id}/items", conversations.items),
    ("POST", "/v1/chat/completions", chat.create),
    ("POST", "/v1/completions", completions.create),
    ("POST", "/v1/messages", messages.create),
    ("POST", "/v1/messages/count_tokens", messages.count_tokens),
    ("GET", "/v1/models", models.listed),
    ("GET", "/v1/models/{id:path}", models.retrieve),
    ("POST", "/admin/drain", draining.drain),
    ("DELETE", "/admin/drain", draining.undrain),
    ("POST", "/admin/snapshot", draining.taken),
    ("POST", "/admin/sleep", sleeping.sleep),
    ("DELETE", "/admin/sleep", sleeping.wake),
)


def application(service: Service) -> Starlette:
    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(service.sweep_forever())
        if service.settings.restore:
            await responses.restore(service)
        yield
        sweeping.cancel()

    methods: dict[str, dict[str, Handler]] = {}
    for method, path, handler in ROUTES:
        methods.setdefault(path, {})[method] = handler
    routes = [Route(path, _door(service, path, handlers), methods=list(handlers)) for path, handlers in methods.items()]
    routes += [Route("/health", _health(service)), Route("/metrics", _metrics(service))]
    routes += browser.routes(service, check_host, _count)
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: _no_route, 405: _no_route})
    app.router.redirect_slashes = False
    return app


def _door(service: Service, path: str, handlers: dict[str, Handler]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        started = time.perf_counter()
        number, context = f"req_{secrets.token_hex(12)}", None
        REQUEST.set(number)
        try:
            check_host(service, request)
            tenant, key_id = service.tenants.of_key(_key(request))
            context = GatewayContext(service, tenant, key_id, dict(request.headers))
            handler = handlers["GET" if request.method == "HEAD" else request.method]
            with service.bodies.room(tenant.name, request):
                reply = await _reply(context, path, handler, request, await service.bodies.read(request))
        except (ClientGone, ClientDisconnect):
            reply = Response(status_code=499)
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an answer, and the log has it
            problem = told(error, f"{request.method} {path}")
            reply = problem_reply(request, problem if isinstance(problem, ApiError) else problem_of(problem))
        reply.headers["x-request-id"] = reply.headers["request-id"] = number
        line = {"request": number, "method": request.method, "endpoint": path, "status": reply.status_code}
        _count(service, context, line, time.perf_counter() - started)
        return reply

    return endpoint


async def _reply(context: GatewayContext, path: str, handler: Handler, request: Request, body: bytes) -> Response:
    """Of the handler; of a request that is sent again with its key, the one that it had."""
    key = request.headers.get("idempotency-key", "")
    if not key or path not in CREATING or request.method != "POST":
        return await handler(context, request, body)
    named = (context.tenant.namespace, path, key[:256])
    return await context.service.repeats.reply(named, body, lambda: handler(context, detached(request), body))


def _count(service: Service, context: GatewayContext | None, line: dict[str, object], seconds: float) -> None:
    tenant = "" if context is None else context.tenant.name
    whose = {} if context is None else {"key": context.key_id, **context.noted}
    endpoint, status = str(line["endpoint"]), str(line["status"])
    service.metrics.add("thaw:requests_total", tenant=tenant, endpoint=endpoint, status=status)
    said = {"time": round(time.time(), 3), "tenant": tenant, **line, "ms": round(seconds * 1e3, 1), **whose}
    audit.info(msgspec.json.encode(said).decode())


def problem_reply(request: Request, problem: ApiError) -> Response:
    """An error's body as the SDK that asked reads it: Anthropic's says so where a path is of both APIs."""
    headers = {} if problem.retry_after is None else {"retry-after": str(max(1, round(problem.retry_after)))}
    if request.url.path.startswith(ANTHROPIC) or "anthropic-version" in request.headers:
        return as_json({"type": "error", "error": messages.error_of(problem)}, problem.status, headers)
    error = {"message": problem.message, "type": problem.kind, "param": problem.param, "code": problem.code}
    return as_json({"error": error}, problem.status, headers)


def check_host(service: Service, request: Request) -> None:
    """A page in a browser that was led here by a name of its own (DNS rebinding) is not answered."""
    host = request.headers.get("host", "")
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name.lower() not in (*LOOPBACK, service.settings.host, *service.settings.hosts):
        raise ApiError(421, "the Host header names another server; allow it with `thaw serve --allow-host NAME`")


def _key(request: Request) -> str | None:
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    found: str | None = value.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key")
    return found


async def _no_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return problem_reply(request, ApiError(status, f"{request.method} {request.url.path[:100]}: no such endpoint"))


def _health(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def health(_: Request) -> Response:
        """No key is asked for, and nothing but this is said. `degraded`: some engines are down; `waiting`: all are."""
        engines, up = service.engines.all, len(service.engines.up)
        status = "asleep" if service.asleep else "drained" if service.draining else _status(up, len(engines))
        status = "ending" if service.closing else status
        told: dict[str, object] = {"status": status}
        if len(engines) > 1:
            told["engines"] = [{"engine": one.number, "up": one.is_up} for one in engines]
        return as_json(told, 200 if status in ("ok", "degraded") else 503)

    return health


def _status(up: int, num: int) -> str:
    return "waiting" if not up else "ok" if up == num else "degraded"


def _metrics(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def metrics(request: Request) -> Response:
        try:
            check_host(service, request)
            service.tenants.of_operator(_key(request))
        except ApiError as problem:
            return problem_reply(request, problem)
        return Response(service.metrics.text(_gauges(service)), media_type="text/plain; version=0.0.4")

    return metrics


def _gauges(service: Service) -> Gauges:
    live, found = service.live, Gauges()
    found.set("thaw:requests_running", service.num_running)
    found.set("thaw:live_sessions", len(live))
    found.set("thaw:live_tokens", live.num_tokens)
    for one in service.engines.all:
        name, held = str(one.number), live.of(one)
        found.set("thaw:engine_up", one.is_up, engine=name)
        found.set("thaw:engine_replaced", one.num_restarts, engine=name)
        found.set("thaw:engine_requests_running", one.running, engine=name)
        found.set("thaw:engine_live_sessions", len(held), engine=name)
        found.set("thaw:engine_live_tokens", sum(len(entry.tokens) for entry in held), engine=name)
    return found
