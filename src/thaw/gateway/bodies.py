"""Bodies of requests, before they are decoded: read in time, no larger than allowed, of few enough values, and not too
many bytes of them at once.

Decoding runs in one go, so that what it may cost is bounded before it begins: by bytes, and by a price for the values
that the JSON has (`price`), since millions of tiny ones take many times the time and memory of their bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterator

from starlette.requests import Request

from thaw.gateway.problems import RETRY_AFTER_S, ApiError
from thaw.gateway.settings import Limits
from thaw.repo.bridge import call

SMALL = 1 << 18
"""A body of so many bytes is cheap whatever it holds."""
ITEM, FIELD, OBJECT = 1, 4, 8
"""What values cost to decode, a list's item being 1."""


class Bodies:
    """Of one gateway. Used by one event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held: defaultdict[str, int] = defaultdict(int)
        """Bytes under way, by tenant."""

    @contextlib.contextmanager
    def room(self, tenant: str, request: Request) -> Iterator[None]:
        """For the body that a request announces, while it is read and answered. One tenant gets half of all room.

        Raises `ApiError` 413, 503.
        """
        nbytes = self._announced(request)
        total = sum(self._held.values())
        most = self._limits.bodies_nbytes
        if nbytes > SMALL and (total + nbytes > most or self._held[tenant] + nbytes > max(most // 2, nbytes)):
            raise ApiError(
                503, "too many large requests are being read; try again soon", code="overloaded_error",
                retry_after=RETRY_AFTER_S,
            )  # fmt: skip
        self._held[tenant] += nbytes
        try:
            yield
        finally:
            self._held[tenant] -= nbytes
            if not self._held[tenant]:
                del self._held[tenant]

    def _announced(self, request: Request) -> int:
        length, limit = request.headers.get("content-length", "0"), self._limits.body_nbytes
        nbytes = int(length) if length.isascii() and length.isdecimal() and len(length) < 20 else limit + 1
        if nbytes > limit:
            raise ApiError(413, f"the body has {length[:20]} bytes; at most {limit}")
        return nbytes

    async def read(self, request: Request) -> bytes:
        """Raises `ApiError` 400, 408, 413; `ClientDisconnect`."""
        if request.method in ("GET", "HEAD", "DELETE"):
            return b""
        try:
            body = await asyncio.wait_for(self._all(request), self._limits.body_s)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self._limits.body_s:g} s") from None
        if len(body) > SMALL:
            await call(require_cheap, body, self._limits.body_values)
        return body

    async def _all(self, request: Request) -> bytes:
        parts, total = [], 0
        async for part in request.stream():
            parts.append(part)
            total += len(part)
            if total > self._limits.body_nbytes:
                raise ApiError(413, f"the body has more than {self._limits.body_nbytes} bytes")
        return b"".join(parts)


def require_cheap(body: bytes, most: int) -> None:
    """Raises `ApiError` 400 where the values of a body cost more than `most`. What stands inside of strings is none."""
    if price(body) <= most:
        return
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if bare.count(b'"') <= 2 * most and price(b"".join(bare.split(b'"')[::2])) <= most:
        return
    raise ApiError(
        400,
        f"the body has too many values: their cost must be at most {most:,}; an item of a list costs {ITEM}, a field "
        f"{FIELD} and an object {OBJECT}",
        code="too_many_values",
    )


def price(text: bytes) -> int:
    return ITEM * (text.count(b",") + text.count(b"[")) + FIELD * text.count(b":") + OBJECT * text.count(b"{")
