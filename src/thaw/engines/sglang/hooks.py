"""Where thaw listens inside SGLang: seven of its functions, wrapped by SGLang's own registry of hooks.

    Scheduler._poll_timeout_aborts      on the first rank, between two steps: what is over by the clock
    Scheduler.process_input_requests    on all ranks: what the first one said is over ends
    Scheduler.handle_generate_request   a message of thaw's comes with a request
    Scheduler.abort_request             a request that others wait for will not come
    Req.init_next_round_input           a request is about to be admitted
    ForwardBatch.init_new               a step of one token each, of which all else is there, is a decode step
    ModelRunner.sample                  the tokens of thaw's requests are chosen

Each of them calls the original; without thaw's cache they do nothing else. A message travels in the `kv_hints` of a
plain request. One that generates goes on to SGLang, when all of its group have come; a command never becomes a request:
its end is told at once, and its answer comes by mail.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from thaw.core.errors import InvalidRequest, ThawError
from thaw.engines.served import protocol
from thaw.engines.served.guard import guarded
from thaw.engines.served.http_errors import http_status, said
from thaw.engines.served.sampling_extra import EXTRA, SamplingExtra, from_extra
from thaw.engines.sglang import support, versions
from thaw.engines.sglang.scheduler.radix_cache import ThawRadixCache
from thaw.engines.sglang.scheduler.rank_consensus import Due
from thaw.engines.sglang.scheduler.sampler import sample
from thaw.engines.sglang.scheduler.scheduler import RankSide
from thaw.engines.sglang.settings import ACTION, REFUSED

GROUP_LIMIT_S = 10.0
UNHEARD = (
    "its answer comes through the engine's mail folder, so it is for those who share that; use thaw's own client "
    "there, as the same user"
)
_ACTIVE: list[ThawRadixCache] = []
"""The cache of this process: at most one."""


def activate(cache: ThawRadixCache) -> None:
    _ACTIVE[:] = [cache]


def _side() -> RankSide | None:
    return _ACTIVE[0].side if _ACTIVE else None


class Waiting:
    """Requests that are to start in one step wait here until all of their group have come, or one will not. They go on
    in the order of their places."""

    def __init__(self) -> None:
        self._groups: dict[str, dict[str, tuple[int, Callable[[], None]]]] = {}
        self._since: dict[str, float] = {}
        self._begun: dict[str, None] = {}

    def add(self, message: protocol.Run, rid: str, go_on: Callable[[], None]) -> None:
        if message.group is None or message.group in self._begun:
            go_on()
            return
        members = self._groups.setdefault(message.group, {})
        self._since.setdefault(message.group, time.monotonic())
        members[rid] = (message.group_place, go_on)
        if len(members) >= message.group_size:
            self._start(message.group)

    def refused(self, message: protocol.Run) -> None:
        """Nobody waits for it."""
        if message.group is not None:
            self._start(message.group)

    def drop(self, rid: str, everybody: bool) -> list[str]:
        """Take out those that are aborted while they wait; the others of their group go on."""
        out = []
        for group, members in list(self._groups.items()):
            gone = [name for name in members if everybody or name.startswith(rid)]
            for name in gone:
                del members[name]
            out += gone
            if gone:
                self._start(group)
        return out

    def late(self) -> tuple[str, ...]:
        """Somebody may never come: nobody waits for longer than `GROUP_LIMIT_S`."""
        now = time.monotonic()
        return tuple(group for group, since in self._since.items() if now - since > GROUP_LIMIT_S)

    def start_late(self, groups: Sequence[str]) -> None:
        for group in groups:
            if group in self._groups:
                self._start(group)

    def _start(self, group: str) -> None:
        self._begun[group] = None
        self._since.pop(group, None)
        while len(self._begun) > 1000:
            self._begun.pop(next(iter(self._begun)))
        for _, go_on in sorted(self._groups.pop(group, {}).values(), key=lambda member: member[0]):
            go_on()


_WAITING = Waiting()


def handle_generate_request(original: Callable[..., None], scheduler: Any, request: Any, **more: Any) -> None:
    payload = _payload(request)
    if payload is None:
        original(scheduler, request, **more)
        return
    side, message = _side(), None

    def failed(error: ThawError) -> None:
        if side is not None:
            side.refuse(str(request.rid), message, error)
        # Without thaw's cache the reply has no status of thaw's: whoever asks who is there hears that nobody is.
        _end(scheduler, request, said(error), _status(error) if side is not None else None)
        if isinstance(message, protocol.Run):
            _WAITING.refused(message)

    def take() -> None:
        nonlocal message
        message = protocol.parse({protocol.KEY: payload.get("message")})
        if side is None or message is None:
            raise InvalidRequest("kv_hints of type thaw without a message, or this SGLang runs without thaw's cache")
        side.require_caller(message)
        if isinstance(message, protocol.Run):
            _begin(side, request, message, payload, go_on)
        else:
            _end(scheduler, request, _command(side, message))

    def go_on() -> None:
        """Where SGLang does not take it in, it is no request of thaw's any more either."""
        guarded(partial(original, scheduler, request, **more), dropped)

    def dropped(error: ThawError) -> None:
        assert side is not None
        side.end(str(request.rid))
        failed(error)

    guarded(take, failed)


def _begin(
    side: RankSide, request: Any, message: protocol.Run, payload: dict[str, Any], go_on: Callable[[], None]
) -> None:
    name, extra = str(request.rid), _extra(payload)
    if message.grammar_from is not None:
        raise InvalidRequest("grammar_from: this SGLang has no grammar for thaw's requests; leave it out")
    support.require_request(request)
    side.begin(name, message, list(request.input_ids), request.extra_key, extra)
    _WAITING.add(message, name, go_on)


def _command(side: RankSide, message: protocol.Command) -> str:
    """What is said at once."""
    if isinstance(message, protocol.Hello):
        return side.hello(message)
    if message.caller is None:
        raise InvalidRequest(f"{type(message).__name__.lower()}: {UNHEARD}")
    side.command(message)
    return ""


def _payload(request: Any) -> dict[str, Any] | None:
    hints = getattr(request, "kv_hints", None)
    if hints is None:
        return None
    return next((action.payload for action in hints.actions if action.action_type == ACTION), None)


def _extra(payload: dict[str, Any]) -> SamplingExtra | None:
    return from_extra({EXTRA: payload["sampling"]} if "sampling" in payload else None)


def _end(scheduler: Any, request: Any, text: str, status: int | None = None) -> None:
    """Tell the front end that this request is over. With a `status` the server's reply has that, unless it streams."""
    from sglang.srt.managers.io_struct import AbortReq

    reason = {"type": "abort", "message": text, "status_code": status, "err_type": None}
    scheduler.ipc_channels.send_to_tokenizer.send_output(AbortReq(rid=request.rid, finished_reason=reason), request)


def abort_request(original: Callable[..., None], scheduler: Any, request: Any) -> None:
    side = _side()
    if side is not None:
        for rid in _WAITING.drop(request.rid, request.abort_all):
            side.end(rid)
    original(scheduler, request)


def poll_timeout_aborts(original: Callable[..., list[Any]], scheduler: Any) -> list[Any]:
    """SGLang asks its first rank alone, and sends what that finds to all with the requests of the step."""
    found, side = original(scheduler), _side()
    due = Due(*side.due(), _WAITING.late(), side.left()) if side is not None else None
    return [*found, due] if due else found


def process_input_requests(original: Callable[..., None], scheduler: Any, requests: Any) -> None:
    side = _side()
    if side is not None:
        for due in [request for request in requests if isinstance(request, Due)]:
            side.end_due(due)
            _WAITING.start_late(due.groups)
            for command in due.commands:
                side.mailed(command)
        requests = [request for request in requests if not isinstance(request, Due)]
    original(scheduler, requests)


def init_next_round_input(
    original: Callable[..., None], req: Any, tree_cache: Any = None, *args: Any, **more: Any
) -> None:
    if not _ACTIVE or tree_cache is not _ACTIVE[0]:
        original(req, tree_cache, *args, **more)
        return
    cache = _ACTIVE[0]
    cache.admitting = True
    try:
        original(req, tree_cache, *args, **more)
        run = cache.side.runs.get(req.rid)
        if run is not None and run.error is not None and req.to_finish is None:
            _end_unread(req, run.error)
            original(req, tree_cache, *args, **more)
    finally:
        cache.admitting = False


def _end_unread(req: Any, error: ThawError) -> None:
    """The request's session cannot be used, and its tokens are not to be read again in its place: it ends as SGLang's
    own refusals do, after a step of one token that nobody sees."""
    req.set_finish_with_abort(f"{REFUSED} {said(error)}")
    req.to_finish = _finish(error)


def _finish(error: ThawError) -> Any:
    """SGLang's end of a request that ends with this error."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    return FINISH_ABORT(f"{REFUSED} {said(error)}", _status(error))


def _status(error: ThawError) -> int:
    return versions.reply_status(http_status(error))


def init_new(original: Callable[..., Any], cls: type, batch: Any, runner: Any, **more: Any) -> Any:
    """The forward pass of a prefill batch in which every request lacks one token only, and one is thaw's, is that of a
    decode step: so a session that was brought back continues with the bits of one that never stopped."""
    side = _side()
    if side is not None and _is_one_token_each(batch) and any(req.rid in side.runs for req in batch.reqs):
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        batch = copy.copy(batch)
        batch.forward_mode = ForwardMode.DECODE
        batch.extend_input_logprob_token_ids = None
    return original(cls, batch, runner, **more)


def _is_one_token_each(batch: Any) -> bool:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    if batch.forward_mode != ForwardMode.EXTEND or batch.decoding_reqs or batch.input_embeds is not None:
        return False
    lens = batch.extend_lens
    return bool(lens) and all(n == 1 for n in lens)


def sample_tokens(original: Callable[..., Any], runner: Any, output: Any, batch: Any) -> Any:
    side = _side()
    runs = side.runs if side is not None else {}
    rows = [(i, runs[rid].chosen) for i, rid in enumerate(batch.rids or ()) if rid in runs] if runs else []
    if not rows:
        return original(runner, output, batch)
    chosen = sample(original, rows, runner, output, batch)
    for run in [runs[rid] for rid in batch.rids if rid in runs]:
        if run.error is not None and run.req is not None and run.req.to_finish is None:
            run.req.to_finish = _finish(run.error)
    return chosen
