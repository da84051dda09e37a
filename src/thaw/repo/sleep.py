"""Sleep and wake: the engine frees its accelerator, and the sessions are in the store meanwhile.

    drain       nothing new begins; every live session is stored at a token boundary
    sleep       by the engine's own sleep mode, which drops KV
    wake        by the engine's own
    load        each session whose KV was dropped, from its point, beside one that begins with the same KV
    go on       the same session objects: their place in history is what it was

A session that could not be stored would be lost by the sleep, so the engine is not put to sleep then, unless the caller
says so. What the engine has kept in host memory is not loaded.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from thaw.core.errors import Busy, Conflict, InvalidRequest, NotFound, ThawError
from thaw.core.ids import CommitId, StateId, short
from thaw.repo.admission import Admission, Asleep
from thaw.repo.drain import DrainedSession, DrainReport, MissedSession, drain
from thaw.repo.parallel import each
from thaw.repo.trunks import trunks

if TYPE_CHECKING:
    from thaw.repo.context import Context
    from thaw.repo.session import Session


class SleepReport(msgspec.Struct, frozen=True, kw_only=True):
    """`points`: all sessions, by where they are stored. `num_dropped` of them have no KV in the engine any more, and
    are loaded when it wakes. `missed`: not stored (with `lose=True`)."""

    level: int
    points: tuple[DrainedSession, ...]
    missed: tuple[MissedSession, ...]
    num_dropped: int
    seconds: float


class WakeReport(msgspec.Struct, frozen=True, kw_only=True):
    """`num_loaded` sessions were loaded from the store. `missed`: those that were not, and why; their tokens can still
    be read, and their points opened."""

    num_loaded: int
    nbytes: int
    missed: tuple[MissedSession, ...]
    seconds: float


def sleep(context: Context, level: int, timeout_s: float, *, lose: bool) -> SleepReport:
    """See the module. Raises `Busy` where it is drained or asleep already, where work outlasts the limit, or where a
    session could not be stored; then nothing has changed."""
    started, admission, engine = time.monotonic(), context.admission, context.engine
    drained = drain(admission, timeout_s, "it is put to sleep", engine.stalled)
    try:
        if not admission.settle(0):
            raise Busy(f"a prefill or a load of a session was not over within {timeout_s:g} s; the engine is awake")
        drained = _as_it_stands(drained, admission)
        if drained.missed and not lose:
            raise Busy(_not_stored(drained))
        dropped = set(engine.sleep(level=level))
    except BaseException:
        admission.open()
        raise
    points = {one.session: one.point for one in drained.points}
    sessions = [one for one in admission.sessions() if one.is_open and one.engine_ref in dropped & points.keys()]
    admission.asleep = Asleep(points=tuple((weakref.ref(one), points[one.engine_ref]) for one in sessions))
    return SleepReport(
        level=level,
        points=drained.points,
        missed=drained.missed,
        num_dropped=len(sessions),
        seconds=time.monotonic() - started,
    )


def _as_it_stands(drained: DrainReport, admission: Admission) -> DrainReport:
    """What outlasted the drain, and has ended by now, went on behind a point or has none: such sessions are missed."""
    points = {one.session: one.num_tokens for one in drained.points}
    missed = {one.session: one for one in drained.missed}
    for session in admission.sessions():
        with contextlib.suppress(InvalidRequest, NotFound):  # closed
            ref, count = session.ref, session.num_tokens
            if ref not in missed and count != points.get(ref, 0):
                why = f"it has {count:,} tokens, of which {points.get(ref, 0):,} are stored: it went on meanwhile"
                missed[ref] = MissedSession(session=ref, namespace=session.namespace, why=why)
    held = tuple(one for one in drained.points if one.session not in missed)
    return msgspec.structs.replace(drained, points=held, missed=tuple(missed.values()))


def _not_stored(drained: DrainReport) -> str:
    first = drained.missed[0]
    return (
        f"{len(drained.missed)} of {len(drained.missed) + len(drained.points)} sessions could not be stored, and sleep "
        f"would drop their KV: session {first.session[:8]}… {first.why}. Close them, or say lose=True; the engine is "
        "awake"
    )


def wake(context: Context) -> WakeReport:
    """See the module. Raises `Conflict` where it does not sleep, and what the engine raises; then it sleeps on."""
    started, admission = time.monotonic(), context.admission
    asleep = admission.asleep
    if asleep is None:
        raise Conflict("the engine was not put to sleep by this repository, so there is nothing to wake (repo.sleep())")
    context.engine.wake()
    held = [(session, point) for found, point in asleep.points if (session := found()) is not None and session.is_open]
    try:
        outcomes = _load(context, held)
    finally:
        admission.asleep = None
        admission.open()
    loaded = [one for one in outcomes if not isinstance(one, ThawError)]
    return WakeReport(
        num_loaded=len(loaded),
        nbytes=sum(loaded),
        missed=tuple(
            MissedSession(
                session=session.engine_ref,
                namespace=session.namespace,
                why=f"{one.kind}: {one} (its point is {short(point)})",
            )
            for (session, point), one in zip(held, outcomes, strict=True)
            if isinstance(one, ThawError)
        ),
        seconds=time.monotonic() - started,
    )


def _load(context: Context, held: Sequence[tuple[Session, CommitId]]) -> list[int | ThawError]:
    """Each session once the one that it shares with is there: the bytes that were loaded, or why not."""
    states = each(lambda one: one[0].stored_at(one[1]).state, held)
    found = [StateId("") if isinstance(one, ThawError) else one for one in states]  # to load it says what is wrong
    shares = "beside" in context.engine.info.capabilities
    before = trunks(context.store, found) if shares else [None] * len(found)
    done: dict[int, int | ThawError] = {}

    def load(at: int) -> int:
        session, point = held[at]
        trunk = before[at]
        shared = trunk is not None and not isinstance(done[trunk], ThawError)
        return session.go_on_from(point, held[trunk][0] if trunk is not None and shared else None)

    while len(done) < len(found):
        ready = [at for at, trunk in enumerate(before) if at not in done and (trunk is None or trunk in done)]
        done |= dict(zip(ready, each(load, ready), strict=True))
    return [one for _, one in sorted(done.items())]
