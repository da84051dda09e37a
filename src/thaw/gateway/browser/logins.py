"""Who is logged in at the tree's pages: a key is asked for once, and a cookie stands for it from then on.

The cookie is random, HttpOnly and SameSite=Strict, and only its SHA-256 is kept, in memory: a restart of the gateway
ends all logins. Whatever changes something needs the login's own CSRF token as well, and comes from this very origin.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time

from starlette.requests import Request

from thaw.gateway.problems import ApiError
from thaw.gateway.tenants import Tenant

LIFETIME_S = 12 * 3600.0
MOST = 100
"""Logins of one namespace at once; its oldest go first, and nobody else's."""


def cookie_name(request: Request) -> str:
    """Of the gateway at this port: a browser sends cookies to all ports of a host."""
    return f"thaw_login_{request.url.port}" if request.url.port else "thaw_login"


class BrowserLogin:
    """One browser's. `key_id` names the key in logs."""

    def __init__(self, tenant: Tenant, key_id: str) -> None:
        self.tenant, self.key_id = tenant, key_id
        self.csrf = secrets.token_urlsafe(24)
        self.ends = time.monotonic() + LIFETIME_S


class BrowserLogins:
    """Used by one event loop."""

    def __init__(self) -> None:
        self._by_digest: dict[bytes, BrowserLogin] = {}

    def begin(self, tenant: Tenant, key_id: str) -> str:
        """The cookie of a new login."""
        cookie = secrets.token_urlsafe(32)
        self._by_digest[_digest(cookie)] = BrowserLogin(tenant, key_id)
        its = [one for one, login in self._by_digest.items() if login.tenant.namespace == tenant.namespace]
        for one in its[:-MOST]:
            del self._by_digest[one]
        return cookie

    def of(self, request: Request) -> BrowserLogin | None:
        digest = _digest(request.cookies.get(cookie_name(request), ""))
        found = self._by_digest.get(digest)
        if found is not None and found.ends < time.monotonic():
            del self._by_digest[digest]
            return None
        return found

    def end(self, request: Request) -> None:
        self._by_digest.pop(_digest(request.cookies.get(cookie_name(request), "")), None)


def _digest(cookie: str) -> bytes:
    return hashlib.sha256(cookie.encode()).digest()


def require_own_origin(request: Request) -> None:
    """That a page of this gateway sent the form, and no other. Raises `ApiError` 403."""
    site = request.headers.get("sec-fetch-site", "same-origin")
    origin = request.headers.get("origin")
    host = request.headers.get("host", "")
    if site != "same-origin" or (origin is not None and origin.partition("://")[2] != host):
        raise ApiError(403, "this form was sent by a page of another site; nothing was done")


def require_csrf(request: Request, login: BrowserLogin, token: str) -> None:
    """As `require_own_origin`, and that the form was made for this login. Raises `ApiError` 403."""
    require_own_origin(request)
    if not hmac.compare_digest(token.encode(), login.csrf.encode()):
        raise ApiError(403, "the form is out of date; reload the page and try again")
