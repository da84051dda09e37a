"""One request's part of an engine's step: what goes wrong there costs that request, never the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from thaw.core.errors import StorageFailed, ThawError

log = logging.getLogger("thaw.served")
T = TypeVar("T")


def guarded(work: Callable[[], T], failed: Callable[[ThawError], None]) -> T | None:
    """What `work` gives. Where it raises, whatever that is: None, once `failed` has heard of it. Never raises where
    `failed` does not."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - whatever one request holds
        failed(described(error))
        return None


def described(error: Exception) -> ThawError:
    """An error as one of thaw's; what nobody foresaw is logged whole."""
    if isinstance(error, ThawError):
        return error
    log.error("thaw: a request could not be handled", exc_info=error)
    return StorageFailed(f"{type(error).__name__}: {error}")


def unheard(error: ThawError) -> None:
    """For `guarded`, where nobody waits for an answer: the operator hears of it."""
    log.warning("thaw: %s: %s", error.kind, error)
