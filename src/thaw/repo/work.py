"""Beginning work on an engine, so that a drain knows of it: a generation, a prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from thaw.engines.base import Completion, GenerateRequest, SessionRef, SessionView
from thaw.repo.context import Context
from thaw.repo.stream import Stream

T = TypeVar("T")


def generate(
    context: Context, requests: Sequence[GenerateRequest], finish: Callable[[list[Completion]], T]
) -> Stream[T]:
    """Run all requests as one batch. Raises `Busy` while the engine is drained, and what the engine raises."""
    admission = context.admission
    with admission.beginning():
        handle = context.engine.generate(requests)
        work = admission.track(handle, [request.session for request in requests], generates=True)
    return Stream(handle, finish, work=work)


def append(context: Context, session: SessionRef, token_ids: Sequence[int], **told: Any) -> SessionView:
    """Prefill. Raises `Busy` while the engine is drained, and what the engine raises."""
    admission = context.admission
    with admission.beginning():
        handle = context.engine.append(session, token_ids, **told)
        admission.track(handle, [session], generates=False)
    return handle.result()
