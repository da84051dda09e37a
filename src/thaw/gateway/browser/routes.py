"""The routes of the tree's pages: a door of its own, since a browser comes with a cookie and not with a key.

Every request passes the check of its Host header. Pages and fragments need a login; what changes something needs the
form's CSRF token, too, and an own origin. Every reply forbids scripts of others, framing and caches.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import parse_qsl

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from thaw.core.errors import ThawError
from thaw.core.ids import CommitId
from thaw.gateway.browser import acts
from thaw.gateway.browser.logins import (
    LIFETIME_S,
    BrowserLogin,
    BrowserLogins,
    cookie_name,
    require_csrf,
    require_own_origin,
)
from thaw.gateway.browser.views import ROWS_AGAIN, TenantView, TenantViews
from thaw.gateway.context import GatewayContext
from thaw.gateway.job import ReplyJob
from thaw.gateway.problems import ApiError, problem_of
from thaw.gateway.reply import EventStream
from thaw.gateway.service import Service
from thaw.repo.bridge import call
from thaw.tree import page, parts
from thaw.tree.markup import Html, VisibleStream, el, join
from thaw.tree.outline import Outline
from thaw.tree.parts import ID_DIGITS, MORE, Living, LivingShown, Unfolded

log = logging.getLogger("thaw.gateway")
FORM_NBYTES = 256 << 10
UNCOUNTED = "/tree/version"
"""Asked every two seconds by each page that is open: a line of the audit log for each would hide the others."""
HEADERS = {
    "content-security-policy": page.SERVER_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
STATIC = {"tree.css": "text/css", "tree.js": "text/javascript"}
CheckHost: TypeAlias = Callable[[Service, Request], None]
Count: TypeAlias = Callable[[Service, GatewayContext | None, dict[str, object], float], None]


@dataclass
class Visit:
    """One request of somebody who is logged in."""

    service: Service
    request: Request
    login: BrowserLogin
    view: TenantView
    context: GatewayContext
    form: Mapping[str, str]

    def living(self, outline: Outline) -> dict[CommitId, LivingShown]:
        """Commits of which all tokens are open in the engine, or that requests run from."""
        standing = self.service.live.standing(self.login.tenant.namespace)
        return {
            commit: LivingShown(num_running=one.num_running, memories=tuple(sorted(one.memories, reverse=True)))
            for commit, one in standing.items()
            if commit in outline.commits and (one.num_running or one.num_tokens >= outline.commits[commit].num_tokens)
        }

    def running(self) -> list[ReplyJob]:
        return self.service.running_in(self.login.tenant.namespace)

    async def outline(self) -> Outline:
        return await call(self.view.outline, self.service)

    def asked(self, name: str) -> str | None:
        """A value of the address; None where there is none."""
        value: str | None = self.request.query_params.get(name)
        return value or None


Look: TypeAlias = Callable[[Visit], Awaitable[Response]]


def routes(service: Service, check_host: CheckHost, count: Count) -> list[Route]:
    """`/` and everything under `/tree`."""
    logins, views = BrowserLogins(), TenantViews()

    async def visit(request: Request) -> Visit | None:
        login = logins.of(request)
        if login is None:
            return None
        context = GatewayContext(service, login.tenant, login.key_id, {})
        form = await _form(request, service.settings.limits.body_s) if request.method == "POST" else {}
        return Visit(service, request, login, views.of(service, login.tenant), context, form)

    def door(path: str, methods: list[str], look: Look, *, changes: bool = False) -> Route:
        async def endpoint(request: Request) -> Response:
            started, who = time.perf_counter(), None
            try:
                check_host(service, request)
                who = await visit(request)
                if who is not None and changes:
                    require_csrf(request, who.login, who.form.get("csrf", ""))
                reply = _not_logged_in(request) if who is None else await look(who)
            except ClientDisconnect:
                reply = Response(status_code=499)
            except (ApiError, ThawError) as error:
                reply = _problem(request, error if isinstance(error, ApiError) else problem_of(error))
            except Exception as error:
                without_values = RuntimeError(type(error).__name__).with_traceback(error.__traceback__)
                log.error("%s %s failed: %s", request.method, path, type(error).__name__, exc_info=without_values)
                reply = _problem(request, ApiError(500, "an error in the gateway; see its log"))
            if path != UNCOUNTED or reply.status_code != 200:
                line = _line(request, path, reply)
                count(service, None if who is None else who.context, line, time.perf_counter() - started)
            return _guarded(reply)

        return Route(path, endpoint, methods=methods)

    async def login(request: Request) -> Response:
        started, context = time.perf_counter(), None
        reply: Response
        try:
            check_host(service, request)
            require_own_origin(request)
            form = await _form(request, service.settings.limits.body_s)
            tenant, key_id = service.tenants.of_key(form.get("key", "").strip())
        except ClientDisconnect:
            reply = Response(status_code=499)
        except ApiError as error:
            said = "This key is not known here." if error.status == 401 else error.message
            reply = _html(page.login_page(said), error.status)
        else:
            context = GatewayContext(service, tenant, key_id, {})
            reply = RedirectResponse("/", 303)
            reply.set_cookie(
                cookie_name(request), logins.begin(tenant, key_id), max_age=int(LIFETIME_S), httponly=True,
                samesite="strict", path="/", secure=request.url.scheme == "https",
            )  # fmt: skip
        line = _line(request, request.url.path, reply)
        count(service, context, line, time.perf_counter() - started)
        return _guarded(reply)

    async def logout(who: Visit) -> Response:
        logins.end(who.request)
        reply = RedirectResponse("/", 303)
        reply.delete_cookie(cookie_name(who.request), path="/")
        return reply

    async def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in STATIC:
            return _guarded(Response(status_code=404))
        return _guarded(Response(page.static(name), media_type=STATIC[name]))

    return [
        door("/", ["GET"], _page),
        door("/tree/rows", ["GET"], _rows),
        door("/tree/point", ["GET"], _point),
        door("/tree/diff", ["GET"], _diff),
        door("/tree/version", ["GET"], _version),
        door("/tree/follow", ["GET"], _follow),
        door("/tree/sessions", ["POST"], _sessions),
        *(door(f"/tree/{name}", ["POST"], _acting(act), changes=True) for name, act in acts.ACTS.items()),
        door("/tree/logout", ["POST"], logout, changes=True),
        Route("/tree/login", login, methods=["POST"]),
        Route("/tree/static/{name}", static, methods=["GET"]),
    ]


# -- what is shown


async def _page(who: Visit) -> Response:
    outline = await who.outline()
    living = who.living(outline)
    jobs = who.running()
    version = await call(who.view.version, who.service, living, [job.name for job in jobs])
    html = await call(
        who.view.whole, outline, living, who.context.codec, who.login.csrf, who.asked("at"), who.asked("with"),
        who.view.running(jobs), version,
    )  # fmt: skip
    return _html(html)


async def _rows(who: Visit) -> Response:
    """The sessions under one, from a number on."""
    outline, of, start = await who.outline(), who.asked("of"), who.asked("from") or "0"
    parent = None if of is None else await call(who.view.commit, outline, of)
    if (of is not None and parent is None) or not start.isdecimal() or len(start) > 9:
        raise ApiError(404, "there is no such session here; reload the page")
    first = None if parent is None else outline.first_of(parent)
    rows = who.view.rows(outline, who.living(outline))
    return _html(await call(rows.children, first, int(start), Unfolded(shown={first: MORE})))


async def _point(who: Visit) -> Response:
    outline = await who.outline()
    html = await call(
        who.view.point, outline, who.asked("at") or "HEAD", who.context.codec, who.login.csrf, who.living(outline)
    )
    return _html(html)


async def _diff(who: Visit) -> Response:
    outline = await who.outline()
    return _html(await call(who.view.diff, outline, who.asked("a") or "HEAD", who.asked("b") or "HEAD"))


async def _version(who: Visit) -> Response:
    living = who.living(await who.outline())
    names = [job.name for job in who.running()]
    return Response(await call(who.view.version, who.service, living, names), media_type="text/plain")


async def _follow(who: Visit) -> Response:
    """The text of a request under way, from its beginning, as it comes."""
    name = who.asked("request")
    job = next((job for job in who.running() if job.name == name), None)
    if job is None:
        raise ApiError(404, "this request is over; its session is in the tree")
    return EventStream(_texts(job), lambda: None)


async def _texts(job: ReplyJob) -> AsyncIterator[bytes]:
    shown = VisibleStream()
    async for pieces in job.follow():
        if text := "".join(shown.push(piece.text) for piece in pieces):
            yield b"data: " + msgspec.json.encode(text) + b"\n\n"
    if text := shown.end():
        yield b"data: " + msgspec.json.encode(text) + b"\n\n"
    yield b"event: end\ndata: 0\n\n"


async def _sessions(who: Visit) -> Response:
    """The tree anew, unfolded as the page has it."""
    outline = await who.outline()
    living = who.living(outline)
    html = await call(_again, who.view, outline, living, dict(who.form))
    return _html(join(who.view.running(who.running()), html))


def _again(view: TenantView, outline: Outline, living: Living, form: Mapping[str, str]) -> Html:
    def first_of(name: str) -> CommitId | None:
        commit = outline.by_digits(name, ID_DIGITS)
        return None if commit is None else outline.first_of(commit)

    wanted: dict[CommitId | None, int] = {}
    for part in form.get("open", "").split(",")[:ROWS_AGAIN]:
        name, _, number = part.partition(":")
        parent = first_of(name) if name else None
        if number.isdecimal() and len(number) < 9 and (parent is not None or not name):
            wanted[parent] = int(number)
    folded = {first_of(name) for name in form.get("shut", "").split(",")[: 2 * ROWS_AGAIN] if name}
    unfolded = parts.unfold_again(outline, wanted, {one for one in folded if one is not None}, ROWS_AGAIN)
    selected = view.commit(outline, form["at"]) if form.get("at") else None
    return join(view.totals(outline), view.tree(outline, living, unfolded, selected))


# -- what is done


def _acting(act: Callable[[GatewayContext, acts.Form], Awaitable[acts.ActOutcome]]) -> Look:
    async def acting(who: Visit) -> Response:
        done = await act(who.context, who.form)
        if done.at is not None and await call(who.view.commit, await who.outline(), done.at) is None:
            done = msgspec.structs.replace(done, at=None)
        if _wants_json(who.request):
            return Response(msgspec.json.encode(done), media_type="application/json")
        return RedirectResponse("/" if done.at is None else f"/?at={done.at}", 303)

    return acting


# -- replies


def _line(request: Request, path: str, reply: Response) -> dict[str, object]:
    """What the audit log says of a request, beside whose it is."""
    number = f"req_{secrets.token_hex(12)}"
    return {"request": number, "method": request.method, "endpoint": path, "status": reply.status_code}


def _html(html: Html, status: int = 200) -> Response:
    return Response(html.encode(), status, media_type="text/html; charset=utf-8")


def _guarded(reply: Response) -> Response:
    reply.headers.update(HEADERS)
    return reply


def _wants_json(request: Request) -> bool:
    return bool(request.headers.get("accept", "").startswith("application/json"))


def _not_logged_in(request: Request) -> Response:
    """The page that asks for a key; to the page's script and to forms only that there is none."""
    return _html(page.login_page(), 200 if request.url.path == "/" else 401)


def _problem(request: Request, problem: ApiError) -> Response:
    headers = {} if problem.retry_after is None else {"retry-after": str(max(1, round(problem.retry_after)))}
    if _wants_json(request):
        body = msgspec.json.encode({"error": problem.message})
        return Response(body, problem.status, headers=headers, media_type="application/json")
    said = el("p", problem.message, class_="warning", role="alert")
    if request.method == "GET" and request.url.path != "/":
        return Response(said.encode(), problem.status, headers=headers, media_type="text/html; charset=utf-8")
    head = el("link", rel="stylesheet", href="/tree/static/tree.css")
    body_ = el("main", el("div", said, el("p", el("a", "Back to the sessions", href="/")), class_="login"))
    whole = page.document("thaw", head, body_)
    return Response(whole.encode(), problem.status, headers=headers, media_type="text/html; charset=utf-8")


async def _form(request: Request, limit_s: float) -> dict[str, str]:
    """The fields of a form, the last of each name. Raises `ApiError`."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise ApiError(400, "a form is expected")
    try:
        data = await asyncio.wait_for(_read(request), limit_s)
        return dict(parse_qsl(data.decode(), keep_blank_values=True, errors="strict", max_num_fields=100))
    except asyncio.TimeoutError:
        raise ApiError(408, f"the form did not arrive within {limit_s:g} s") from None
    except ValueError:
        raise ApiError(400, "the form cannot be read") from None


async def _read(request: Request) -> bytes:
    parts_of, total = [], 0
    async for part in request.stream():
        total += len(part)
        if total > FORM_NBYTES:
            raise ApiError(413, f"the form has more than {FORM_NBYTES} bytes")
        parts_of.append(part)
    return b"".join(parts_of)
