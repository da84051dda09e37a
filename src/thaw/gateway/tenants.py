"""Tenants: which key is whose, and what each may use.

Keys are kept as their SHA-256 alone, compared in constant time, and appear in no log or message; a log names a key by
the first digits of that hash. Each tenant has a namespace of the repository, so that it reaches nothing of others.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec

from thaw.core import namespaces
from thaw.core.errors import InvalidRequest
from thaw.data.files import storage_errors
from thaw.engines.keys import check_key
from thaw.gateway.problems import ApiError
from thaw.weights import record

MINUTE_S = 60.0
DAY_S = 24 * 3600.0


class Quota(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """None: no limit. `tokens_per_minute` counts what was computed: tokens read and sampled, not those found cached."""

    bytes: int | None = None
    sessions: int | None = None
    tokens_per_minute: int | None = None


class Listed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tenant as a keys file lists it: each key as it is, or `sha256:…` of it. `operator`: may read the metrics, which
    are of all tenants. `keep_days`: how long its responses without a name are kept at most; None: as all others."""

    namespace: str
    keys: tuple[str, ...]
    quota: Quota = Quota()
    operator: bool = False
    keep_days: Annotated[float, msgspec.Meta(ge=0)] | None = None


class Meter:
    """Tokens of the last minute, second by second."""

    def __init__(self) -> None:
        self._spent: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, tokens: int) -> None:
        now = time.monotonic()
        if self._spent and now - self._spent[-1][0] < 1.0:
            begun, before = self._spent.pop()
            self._spent.append((begun, before + tokens))
        else:
            self._spent.append((now, tokens))
            self.last_minute()  # which drops what is older, also where no quota asks
        self._sum += tokens

    def last_minute(self) -> int:
        begin = time.monotonic() - MINUTE_S
        while self._spent and self._spent[0][0] < begin:
            self._sum -= self._spent.popleft()[1]
        return self._sum

    def wait_s(self) -> float:
        """Until the oldest of them counts no more."""
        return max(1.0, self._spent[0][0] + MINUTE_S - time.monotonic()) if self._spent else 1.0


class Tenant:
    """Whose a request is. `namespace` "": the default one."""

    def __init__(
        self, namespace: str, quota: Quota, *, operator: bool = False, lifetime_s: float | None = None
    ) -> None:
        self.namespace = namespace
        self.lifetime_s = lifetime_s
        """Of its responses that nobody named; None: that of the gateway's settings."""
        self.quota = quota
        self.operator = operator
        self.running = 0
        self.meter = Meter()
        self.spending: dict[Spending, None] = {}
        """Of the jobs that run, in the order in which they were admitted."""
        self.unwritten = 0
        """Bytes of KV that running requests have made, or are about to."""

    @property
    def name(self) -> str:
        return self.namespace or "default"

    @property
    def promised(self) -> int:
        """Tokens that running requests may still compute."""
        return sum(one.answer + one.unread for one in self.spending)

    def admit(self, choices: int, answer: int, nbytes: int) -> None:
        """Raise `ApiError` 429 where a quota is used up. `answer`: tokens that each choice may sample; `nbytes` is what
        the tenant keeps stored."""
        quota = self.quota
        if quota.sessions is not None and self.running + choices > quota.sessions:
            raise _spent(f"{self.running} of {quota.sessions} sessions are running", 1.0)
        self.require_tokens(self.promised + (choices - 1) * answer)
        self.require_bytes(nbytes)

    def require_bytes(self, nbytes: int) -> None:
        """Raise `ApiError` 429 where what is stored, `nbytes`, and what requests are making, is all."""
        most, total = self.quota.bytes, nbytes + self.unwritten
        if most is not None and total >= most:
            raise ApiError(
                429, f"{total:,} of {most:,} bytes are stored or being made; delete responses",
                code="insufficient_quota",
            )  # fmt: skip

    def require_tokens(self, promised: int) -> None:
        """Raise `ApiError` 429 where what was computed in the last minute, and what others were promised, is all."""
        most = self.quota.tokens_per_minute
        if most is None:
            return
        spent = self.meter.last_minute()
        if spent + promised >= most:
            still = f", {promised} of them promised to requests that run" if promised else ""
            wait_s = self.meter.wait_s() if spent >= most else 1.0
            raise _spent(f"the quota of {most} tokens per minute is used up{still}", wait_s)


class Spending:
    """Of one job: what it may still compute is promised to it until it has, so that requests that come at once do not
    share what is left of a quota. What was computed counts, whatever becomes of the job. `request`: the jobs of one
    request, which was admitted as one."""

    def __init__(
        self, tenant: Tenant, answer: int, token_nbytes: int, request: list[Spending], stored: Callable[[], int]
    ) -> None:
        self._tenant, self._token_nbytes, self._request, self._stored = tenant, token_nbytes, request, stored
        request.append(self)
        self.unread, self.answer = 0, answer
        """Tokens of the prompt and of the answer that it may still compute."""
        self._unwritten = 0
        tenant.running += 1
        tenant.spending[self] = None

    def prompt(self, tokens: int) -> None:
        """It is about to read so many. Raises `ApiError` 429; once they have been promised, they are."""
        self._tenant.require_tokens(self._promised_before())
        mine = sum(one._unwritten for one in self._request)
        if self._tenant.unwritten > mine:
            self._tenant.require_bytes(self._stored() - mine)
        self.unread = tokens
        self._make(tokens)

    def _promised_before(self) -> int:
        """To others: all prompts, and the answers of those that were admitted earlier."""
        total, earlier = 0, True
        for one in self._tenant.spending:
            earlier = earlier and one is not self
            if one not in self._request:
                total += one.unread + (one.answer if earlier else 0)
        return total

    def ran(self, tokens: int) -> None:
        """So many were sampled; the prompt has been read."""
        self.read()
        self.answer -= min(tokens, self.answer)
        self._tenant.meter.add(tokens)
        self._make(tokens)

    def read(self) -> None:
        """The prompt has been read, or somebody stopped while it was."""
        self._tenant.meter.add(self.unread)
        self.unread = 0

    def over(self) -> None:
        """The job has ended; what it made is written, or gone."""
        self._tenant.running -= 1
        self._tenant.unwritten -= self._unwritten
        del self._tenant.spending[self]

    def _make(self, tokens: int) -> None:
        self._unwritten += tokens * self._token_nbytes
        self._tenant.unwritten += tokens * self._token_nbytes


def _spent(what: str, wait_s: float) -> ApiError:
    return ApiError(429, f"{what}; try again later", code="rate_limit_exceeded", retry_after=wait_s)


class Tenants:
    """All of them, by key."""

    def __init__(self, by_digest: dict[bytes, Tenant]) -> None:
        self._by_digest = by_digest
        self.num = len(self.all)

    @property
    def all(self) -> list[Tenant]:
        return list({id(tenant): tenant for tenant in self._by_digest.values()}.values())

    def of_key(self, key: str | None) -> tuple[Tenant, str]:
        """The tenant and the key's name for logs. Raises `ApiError` 401; the look at all keys takes as long for any."""
        said = hashlib.sha256((key or "").encode()).digest()
        found = None
        for digest, tenant in self._by_digest.items():
            if hmac.compare_digest(digest, said):
                found = tenant
        if found is None:
            why = "no key was sent" if not key else "the key is unknown"
            raise ApiError(401, f"{why}: send it as `Authorization: Bearer …` or `x-api-key`", code="invalid_api_key")
        return found, said.hex()[:8]

    def of_namespace(self, namespace: str) -> Tenant:
        """The tenant of a namespace; one without keys or limits where none is listed any more."""
        return next((one for one in self.all if one.namespace == namespace), Tenant(namespace, Quota()))

    def of_operator(self, key: str | None) -> Tenant:
        """The tenant, where it may see what concerns all. Raises `ApiError` 401, 403."""
        tenant, _ = self.of_key(key)
        if not tenant.operator:
            raise ApiError(403, "this key is not an operator's")
        return tenant


def single(token: str) -> Tenants:
    """One tenant, of the default namespace."""
    check_key(token, "the key")
    return Tenants({hashlib.sha256(token.encode()).digest(): Tenant("", Quota(), operator=True)})


def fresh_token() -> str:
    return f"thaw-{secrets.token_urlsafe(24)}"


def load(path: Path) -> Tenants:
    """The tenants of a keys file: a JSON list of `{"namespace", "keys", "quota"}`. Nobody else may read the file.

    Raises `InvalidRequest` for what it says, `StorageFailed`.
    """
    with storage_errors(path, "read the keys of"):
        if os.stat(path).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise InvalidRequest(f"{path} can be read by others: its mode must be 0600 (chmod 600)")
        data = path.read_bytes()
    try:
        listed = msgspec.json.decode(data, type=list[Listed])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f'{path}: {error}. Write [{{"namespace": "acme", "keys": ["sha256:…"]}}]') from None
    by_digest: dict[bytes, Tenant] = {}
    names = [one.namespace for one in listed]
    if len(set(names)) < len(names):
        raise InvalidRequest(f"{path}: a namespace is listed twice; list all of its keys in one entry")
    if record.NAMESPACE in names:
        raise InvalidRequest(f"{path}: the namespace {record.NAMESPACE} holds the repository's weights")
    for one in listed:
        lifetime_s = None if one.keep_days is None else one.keep_days * DAY_S
        tenant = Tenant(namespaces.check(one.namespace), one.quota, operator=one.operator, lifetime_s=lifetime_s)
        for key in one.keys:
            if by_digest.setdefault(_digest(key, path), tenant) is not tenant:
                raise InvalidRequest(f"{path}: one key is listed for two tenants")
    if not by_digest:
        raise InvalidRequest(f"{path} lists no keys, so no client could send requests")
    return Tenants(by_digest)


def _digest(key: str, path: Path) -> bytes:
    if not key.startswith("sha256:"):
        return hashlib.sha256(check_key(key, f"a key of {path}").encode()).digest()
    try:
        digest = bytes.fromhex(key.removeprefix("sha256:"))
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise InvalidRequest(f"{path}: `sha256:` must be followed by 64 hex digits")
    return digest
