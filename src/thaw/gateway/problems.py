"""What a client gets when a request fails: a status and a message, the same in every dialect; each has its own body."""

from __future__ import annotations

import logging

from thaw.core import errors
from thaw.core.errors import ThawError

log = logging.getLogger("thaw.gateway")
RETRY_AFTER_S = 2
MAX_MESSAGE = 2000
"""Characters; what a client sent may be quoted in it."""


class ApiError(Exception):
    """A request that is not answered. `param` names the field that is meant; `retry_after` seconds are worth a try."""

    def __init__(
        self, status: int, message: str, *, code: str = "", param: str | None = None, retry_after: float | None = None
    ) -> None:
        message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} …"
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = KINDS.get(status, "api_error")
        self.code = code or self.kind
        self.param = param
        self.retry_after = retry_after


KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict_error",
    413: "request_too_large",
    421: "misdirected_request",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
"""The kind of an error by its status, in the words that both APIs have."""

STATUSES: tuple[tuple[type[ThawError], int], ...] = (
    (errors.NotFound, 404),
    (errors.InvalidRequest, 400),
    (errors.Conflict, 409),
    (errors.Refused, 409),
    (errors.EngineDied, 503),
    (errors.Cancelled, 503),
    (errors.TimedOut, 503),
    (errors.StorageFailed, 503),
    (ThawError, 500),
)
"""The first that fits counts."""
UNTOLD = (errors.StorageFailed, errors.Damaged)
"""Their messages name files of the server."""


def problem_of(error: ThawError) -> ApiError:
    """What a client gets for an error of thaw's."""
    status = next(status for kind, status in STATUSES if isinstance(error, kind))
    code = "context_length_exceeded" if isinstance(error, errors.TooLong) else error.kind.replace("-", "_")
    told = f"{error.kind}: see the server's log" if isinstance(error, UNTOLD) else str(error)
    return ApiError(status, told, code=code, retry_after=RETRY_AFTER_S if status == 503 else None)


def without_values(error: BaseException) -> Exception:
    """The error for a log: with its places in our code, and without its message, which may hold what a client said."""
    return RuntimeError(type(error).__name__).with_traceback(error.__traceback__)


def told(error: Exception, what: str) -> ThawError | ApiError:
    """What those who wait for `what` get for an error: thaw's own as they are; any other is logged, and is a 500."""
    if isinstance(error, (ThawError, ApiError)):
        return error
    log.error("%s failed: %s", what, type(error).__name__, exc_info=without_values(error))
    return ApiError(500, "an error in the gateway; see its log")


def unsupported(param: str, why: str) -> ApiError:
    """A field that could change the output, and cannot be done."""
    return ApiError(400, f"{param}: {why}", code="unsupported_parameter", param=param)


def invalid(param: str, why: str) -> ApiError:
    return ApiError(400, f"{param}: {why}", code="invalid_value", param=param)
