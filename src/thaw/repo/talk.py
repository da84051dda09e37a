"""Chats of several sessions as one batch: all are planned before any is touched, and if the batch fails all go back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import msgspec

from thaw.core.errors import ThawError
from thaw.engines.base import Completion
from thaw.repo.chat import ChatRequest, ChatResult
from thaw.repo.context import Context
from thaw.repo.params import as_sampling
from thaw.repo.stream import Stream

if TYPE_CHECKING:
    from thaw.repo.session import Session

T = TypeVar("T")


def stream(
    context: Context,
    sessions: Sequence[Session],
    asks: Sequence[ChatRequest],
    samplings: Sequence[object],
    pick: Callable[[list[ChatResult]], T],
) -> Stream[T]:
    """Answer each session's messages, in one batch. `pick` makes the outcome of the results, in order."""
    params = [as_sampling(sampling) for sampling in samplings]
    plans = [session.plan_chat(asked) for session, asked in zip(sessions, asks, strict=True)]

    def settle(*, failed: bool) -> None:
        for session in sessions:
            session.settle_chat(failed=failed)

    def finish(done: list[Completion]) -> T:
        settle(failed=False)
        answers = [_with_reread(completion, num) for completion, num in zip(done, rereads, strict=True)]
        return pick([plan.result(completion) for plan, completion in zip(plans, answers, strict=True)])

    admission = context.admission
    with admission.beginning():
        try:
            requests = [session.follow(plan, s) for session, plan, s in zip(sessions, plans, params, strict=True)]
            rereads = [session.num_reread for session in sessions]
            handle = context.engine.generate(requests)
        except ThawError:
            settle(failed=True)
            raise
        work = admission.track(handle, [request.session for request in requests], generates=True)
    return Stream(handle, finish, lambda: settle(failed=True), work)


def _with_reread(completion: Completion, num: int) -> Completion:
    """Its counts, with the `num` tokens that were prefilled again before its prompt was."""
    usage = completion.usage
    counted = msgspec.structs.replace(
        usage,
        num_cached_tokens=usage.num_cached_tokens - num,
        num_prefilled_tokens=usage.num_prefilled_tokens + num,
    )
    return msgspec.structs.replace(completion, usage=counted) if num else completion
