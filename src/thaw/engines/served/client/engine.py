"""thaw's contract over the requests of an engine that serves them from processes of its own: vLLM, SGLang.

All that the client knows is owned by one event loop on a thread of its own (`loop`); every verb is a coroutine there.
KV stays in the engine's processes: a session names a record in the workers' arena, a fork names its parent's. A verb
becomes messages and requests (`channel`, `generation`, `capturing`, `hydrating`, `pins`); what differs between servers
is in its `Dialect`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from thaw.core.cache import CacheGroup, keeps_all, point_groups
from thaw.core.errors import Busy, Conflict, EngineDied, InvalidRequest, NotFound, StaleSession, Unsupported
from thaw.core.identity import ModelIdentity
from thaw.core.objects import Chat
from thaw.core.proof import Continuation
from thaw.core.sampling import check_seed, derive, fresh_seed
from thaw.engines.base import (
    Captured,
    CapturePlan,
    Codec,
    Completion,
    Engine,
    EngineInfo,
    GenerateRequest,
    Handle,
    Hydrated,
    HydratePlan,
    SessionRef,
    SessionView,
    check_sleep_level,
)
from thaw.engines.promise import Promise
from thaw.engines.served import protocol
from thaw.engines.served.client import capturing, hydrating
from thaw.engines.served.client.channel import EngineChannel, worker_facts
from thaw.engines.served.client.dialect import Dialect
from thaw.engines.served.client.event_loop import LoopThread, soon
from thaw.engines.served.client.generation import Generation
from thaw.engines.served.client.model import ServedModel
from thaw.engines.served.client.pins import ClientPins
from thaw.engines.served.client.session import ServedSession, forked, new_session, with_gap
from thaw.engines.served.client.transport import Transport
from thaw.engines.served.protocol import EngineFacts, WorkerFacts
from thaw.engines.session.children import check_children
from thaw.engines.session.turns import reseed

CAPABILITIES = frozenset(
    {"capture-running", "fork-running", "interior-points", "park", "pin", "resume", "policy", "logprobs", "entropy"}
)
WITHOUT_STATES = frozenset({"fork-running"})
"""What an engine has not of a model that keeps states: a session has them at the ends of its turns."""
WITH_STATES = frozenset({"points"})
"""What it has of such a model alone."""
MAX_TOP_LOGPROBS = 100
T = TypeVar("T")


class ServedEngine(Engine):
    """One server (tensor-parallel ranks included). Sessions live until `close_session` or `close`."""

    name: ClassVar[str]
    """As `load_engine` knows it."""
    dialect: ClassVar[type[Dialect]]
    continuation: ClassVar[Continuation] = "decode-exact"
    capabilities: ClassVar[frozenset[str]] = CAPABILITIES

    def __init__(
        self,
        transport: Transport,
        *,
        codec: Codec,
        identity: Callable[[tuple[CacheGroup, ...]], ModelIdentity],
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
        name: str,
        policy: str,
        loop: LoopThread,
    ) -> None:
        self._loop, self._transport = loop, transport
        self._sessions: dict[SessionRef, ServedSession] = {}
        self.codec = codec
        self.info = self._info(transport.facts, worker_facts(transport)[0], name, vocab_size, eos_token_ids)
        self._talk = EngineChannel(transport, self.dialect(transport.facts, self.info, codec))
        self._model = ServedModel(self._talk, self.info, codec, policy, identity)
        self._pins = ClientPins(loop, self._talk)
        self._generation = Generation(loop, self._talk, self._model)
        self._asleep = 0
        self._under_way: set[asyncio.Task[Any]] = set()
        """What reads or writes KV, weights or adapters: the engine does not fall asleep in the middle of it."""

    def _info(
        self, facts: EngineFacts, worker: WorkerFacts, model: str, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> EngineInfo:
        interior = keeps_all(worker.groups) or facts.interior
        return EngineInfo(
            name=self.name,
            version=facts.version,
            model=model,
            device=worker.layout.get("device", "cpu"),
            continuation=self.continuation,
            groups=worker.groups,
            max_model_len=facts.max_model_len,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            capabilities=_of(worker.groups, self.capabilities_of(facts), interior=interior),
            numerics={
                self.name: facts.version,
                "runner": facts.runner,
                "block_size": str(facts.block_size),
                "tensor_parallel_size": str(facts.world_size),
                **{f"layout.{key}": value for key, value in worker.layout.items()},
            },
            num_packs=facts.world_size,
        )

    def capabilities_of(self, facts: EngineFacts) -> frozenset[str]:
        """`capabilities`, as far as this server has them."""
        found = {"sleep": facts.sleep_levels, "adapters": facts.max_adapters}
        return self.capabilities | {name for name, has in found.items() if has}

    # -- the contract

    def identity(self, adapter: str | None = None) -> ModelIdentity:
        async def look() -> ModelIdentity:
            return await self._model.identity(await self._model.adapters.id_of(adapter) if adapter else None)

        return self._loop.wait(self._whole(look))

    def adapters(self) -> dict[str, str]:
        return self._loop.wait(self._model.adapters.listed())

    def load_adapter(self, name: str, folder: str | Path) -> str:
        return self._loop.wait(self._whole(lambda: self._model.adapters.load(name, Path(folder))))

    def open(
        self,
        *,
        seed: int | None = None,
        salt: str | None = None,
        share_prefix: bool = False,
        adapter: str | None = None,
    ) -> SessionRef:
        self._require_awake()
        number = fresh_seed() if seed is None else int(check_seed(seed))

        async def begin() -> SessionRef:
            found = (await self._model.adapters.find(adapter)).id if adapter else None
            return self._admit(new_session(self._model.policy, number, salt, share_prefix, found))

        return self._loop.wait(begin())

    def view(self, session: SessionRef) -> SessionView:
        return self._loop.wait(soon(lambda: self._get(session).view()))

    def append(
        self,
        session: SessionRef,
        token_ids: Sequence[int],
        *,
        text: str = "",
        role: str | None = None,
        chat: Chat | None = None,
    ) -> Handle[SessionView]:
        return self._loop.begin(
            lambda promise: self._generation.append(promise, self._usable(session), list(token_ids), text, role, chat)
        )

    def keep_points(self, session: SessionRef, tokens: Sequence[int], *, unaligned: bool = False) -> None:
        if not self._model.keeps_states:
            super().keep_points(session, tokens, unaligned=unaligned)
        asked = tuple(tokens)
        self._loop.wait(soon(lambda: self._ask(self._usable(session), asked, unaligned)))

    def generate(self, requests: Sequence[GenerateRequest]) -> Handle[list[Completion]]:
        if not requests:
            raise InvalidRequest("generate: no requests; give at least one session")
        asked = tuple(requests)
        return self._loop.begin(lambda promise: self._generation.generate(promise, self._batch(asked), asked))

    def capture(self, session: SessionRef, plan: CapturePlan) -> Handle[Captured]:
        async def write() -> Captured:
            return await capturing.capture(self._fresh(session), plan, self._talk, self._model)

        return self._loop.begin(lambda _: self._whole(write))

    def hydrate(self, plan: HydratePlan) -> Handle[Hydrated]:
        self._require_awake()

        async def restore() -> Hydrated:
            beside = self._sessions.get(plan.beside) if plan.beside is not None else None
            session = await hydrating.hydrate(plan, self._talk, self._model, self._generation, beside)
            assert session.proof is not None
            return Hydrated(session=self._admit(session), proof=session.proof)

        return self._loop.begin(lambda _: self._whole(restore))

    def fork(
        self,
        session: SessionRef,
        n: int,
        *,
        at: int | None = None,
        replay: bool = False,
        seeds: Sequence[int] | None = None,
    ) -> Handle[list[SessionRef]]:
        check_children(n, replay, seeds)
        return self._loop.begin(lambda _: soon(lambda: self._fork(self._fresh(session), n, at, replay, seeds)))

    def reread(self, session: SessionRef, at: int) -> Handle[SessionRef]:
        if not self._model.keeps_states:
            return super().reread(session, at)

        async def again(promise: Promise[SessionRef]) -> SessionRef:
            child = self._nearest(self._fresh(session), at)
            await self._generation.read_again(promise, child)
            return self._admit(child)

        return self._loop.begin(lambda promise: self._whole(lambda: again(promise)))

    def park(self, session: SessionRef) -> Handle[SessionView]:
        def put_away() -> SessionView:
            live = self._usable(session)
            live.parked = True
            return live.view()

        return self._loop.begin(lambda _: soon(put_away))

    def set_policy(self, version: str) -> None:
        """See the contract. Sessions opened before keep the old version; their KV is not used any more. All pins of
        the engine end, so that the server's own reset of its prefix cache works."""
        if not version or len(version) > 200:
            raise InvalidRequest(f"policy version {version!r}: must be 1 to 200 characters")
        self._require_awake()

        async def change() -> None:
            self._model.policy = version
            await self._pins.end_all()

        self._loop.wait(change())

    @property
    def policy_version(self) -> str:
        return self._model.policy

    def pin(self, session: SessionRef, seconds: float) -> Handle[int]:
        """Hold the session's full blocks in the engine for `seconds` (0: let go). The result is the tokens held; states
        lie in the arena without a pin.

        Opt-in, because it takes room from everybody, and the server's own reset of its prefix cache may refuse to run
        while blocks are held (docs/engines). Ends by itself at the engine's limit (`pin_seconds`), when the session
        is closed, with `set_policy`, and with `release_pins`.
        """
        return self._loop.begin(lambda _: self._pins.pin(self._usable(session), seconds))

    def release_pins(self) -> None:
        """End all pins of the engine, other clients' too: before the server's own reset, pause, sleep or weight update.
        Works while the engine is paused."""
        self._require_awake()
        self._loop.wait(self._pins.end_all())

    def require_sleep(self, *, level: int = 1) -> None:
        check_sleep_level(level)
        self._require_awake()
        if level not in self._transport.facts.sleep_levels:
            raise Unsupported(self.no_sleep(self._transport.facts, level))

    @classmethod
    def no_sleep(cls, facts: EngineFacts, level: int) -> str:
        """Why this server does not sleep with this level, and what to do."""
        return f"this {cls.name} cannot be put to sleep with sessions of thaw's; close it, and start it again"

    def sleep(self, *, level: int = 1) -> tuple[SessionRef, ...]:
        """See the contract. Every session's KV is in the arena, in host memory, and comes back by itself. Raises `Busy`
        while sessions of other clients run, too; requests that carry none end as the server's own sleep mode has it."""
        self.require_sleep(level=level)
        self._loop.wait(self._fall_asleep(level))
        return ()

    def wake(self) -> None:
        self._loop.wait(self._wake_up())

    async def _fall_asleep(self, level: int) -> None:
        running = sum(live.busy is not None for live in self._sessions.values())
        if running:
            raise Busy(f"{running} sessions are running; wait for their results or cancel them (repo.sleep() does)")
        self._asleep = level
        try:
            if self._under_way:
                await asyncio.wait(self._under_way)
            await self._pins.end_all()
            stats = protocol.GetStats(id=secrets.token_hex(16))  # answered behind all that is to be saved
            others = (await self._talk.command(stats)).counts["running"]
            if others:
                raise Busy(
                    f"{self._transport.facts.engine} works for others: {others} requests of their sessions run; wait "
                    "for their end, or have these clients stop them"
                )
            await self._put_to_sleep(level)
        except BaseException:
            self._asleep = 0
            raise

    async def _wake_up(self) -> None:
        if not self._asleep:
            raise Conflict(f"engine {self.info.name} was not put to sleep from here")
        await self._bring_back(self._asleep)
        self._asleep = 0

    async def _put_to_sleep(self, level: int) -> None:
        """By the server's own sleep mode."""
        await self._transport.sleep(level)

    async def _bring_back(self, level: int) -> None:
        await self._transport.wake(level)

    async def _whole(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do what no session shows to be under way: sleep waits for it, and it does not begin during that."""
        self._require_awake()
        task = asyncio.current_task()
        assert task is not None
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return await work()

    def _require_awake(self) -> None:
        if self._asleep:
            raise Busy(f"engine {self.info.name} is asleep, and does nothing until engine.wake() (repo.wake())")

    def stats(self) -> dict[str, int]:
        """Counts of the engine: records, blocks (free, pinned), captures, hydrates, refusals, bytes of the arenas."""
        self._require_awake()
        return self._loop.wait(self._talk.command(protocol.GetStats(id=secrets.token_hex(16)))).counts

    def switch(self, *, on: bool = True, watch_weights: bool = True) -> None:
        """Turn thaw off in the engine without a restart (thaw's requests are refused, plain ones untouched), or on.

        `watch_weights` False leaves out the look at the weights where KV is used: only for owners who announce every
        change with `set_policy`, for what nobody announces is then not noticed.
        """
        self._require_awake()
        message = protocol.Switch(id=secrets.token_hex(16), on=on, watch_weights=watch_weights)
        self._loop.wait(self._talk.command(message))

    def collective_rpc(
        self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        """The server's own `collective_rpc` on every worker, for engines of this process: how trainers load weights."""
        self._require_awake()
        return self._loop.wait(self._transport.collective_rpc(method, args, kwargs or {}))

    def alive(self) -> bool:
        """Whether the engine's process runs and this client is open."""
        if self._loop.closed:
            return False
        try:
            self._transport.mail.check_alive()
        except EngineDied:
            return False
        return True

    def close_session(self, session: SessionRef) -> None:
        async def drop() -> None:
            live = self._sessions.pop(session, None)
            if live is not None and live.busy is not None:
                await self._generation.abort(live.busy)
            if live is not None:
                await self._pins.end_of(live)

        if not self._loop.closed:
            self._loop.wait(drop())

    def close(self) -> None:
        if not self._loop.closed:
            self._loop.wait(self._shut())

    async def _shut(self) -> None:
        await self._loop.end()
        self._sessions.clear()
        self._pins.forget_all()
        await self._talk.farewell()
        await self._transport.close()
        self._loop.stop()

    # -- the sessions' table

    def _admit(self, session: ServedSession) -> SessionRef:
        self._sessions[session.ref] = session
        return session.ref

    def _get(self, ref: SessionRef) -> ServedSession:
        live = self._sessions.get(ref)
        if live is None:
            raise NotFound(
                f"session {ref[:8]}… is not open in this engine: it was closed, or belongs to another engine"
            )
        return live

    def _fresh(self, ref: SessionRef) -> ServedSession:
        """The session, if its KV is of the policy that runs now. The weights are looked at where KV is used."""
        self._require_awake()
        live, policy = self._get(ref), self._model.policy
        if live.policy != policy:
            if live.computed():
                raise StaleSession(
                    f"the session's KV is of policy {live.policy!r}; the engine now runs policy {policy!r}. "
                    f"{StaleSession.way_out}"
                )
            live.policy = policy
        return live

    def _usable(self, ref: SessionRef) -> ServedSession:
        live = self._fresh(ref)
        if live.busy is not None:
            raise Busy(f"session {ref[:8]}… is running; wait for its result, cancel it, or fork it")
        return live

    def _batch(self, asked: Sequence[GenerateRequest]) -> list[ServedSession]:
        refs = [request.session for request in asked]
        if len(set(refs)) != len(refs):
            raise InvalidRequest("generate: the same session stands twice in one batch; fork it first")
        return [self._usable(ref) for ref in refs]

    def _fork(
        self, parent: ServedSession, n: int, at: int | None, replay: bool, seeds: Sequence[int] | None
    ) -> list[SessionRef]:
        position = _inside(parent, len(parent.tokens) if at is None else at)
        how = {"keeps_states": self._model.keeps_states}
        children = [forked(parent, position, self.codec, self.info.continuation, **how) for _ in range(n)]
        for i, child in enumerate(children):
            if not replay:
                reseed(child, seeds[i] if seeds else derive(parent.seed, position, i))
        return [self._admit(child) for child in children]

    def _nearest(self, parent: ServedSession, at: int) -> ServedSession:
        """A child of the first `at` tokens, with the KV up to the nearest point: the rest is to be read again."""
        child = forked(parent, _inside(parent, at), self.codec, self.info.continuation, nearest=True)
        assert child.proof is not None
        child.proof = with_gap(child.proof, child.num_kv, "read again as asked")
        return child

    def _ask(self, live: ServedSession, tokens: Sequence[int], unaligned: bool) -> None:
        """Raises as `keep_points`."""
        for token in tokens:
            require_point(token, self.info.max_model_len, 1 if unaligned else self._transport.facts.point_multiple)
        pending = {token for token in (*live.asked, *tokens) if token > live.num_kv}
        if len(pending) > protocol.MAX_POINTS:
            raise InvalidRequest(
                f"{len(pending):,} points in what is still to be read: at most {protocol.MAX_POINTS:,} are kept in mind"
            )
        live.ask(tokens)


def require_point(token: object, limit: int, multiple: int) -> None:
    """Raise `InvalidRequest` for what is no number of tokens that a state can be asked for at."""
    if not isinstance(token, int) or not 0 < token <= limit:
        raise InvalidRequest(f"a point at token {token!r}: it must be 1 to {limit}")
    if token % multiple:
        near = [n for n in (token // multiple * multiple, (token // multiple + 1) * multiple) if n]
        raise InvalidRequest(
            f"a point at token {token}: the model's recurrent layers read {multiple} tokens at a time, and a prefill "
            f"that is cut inside such a chunk computes other bits than one that is not. Ask for "
            f"{' or '.join(map(str, near))}, or insist (unaligned=True, --unaligned)"
        )


def _inside(parent: ServedSession, at: int) -> int:
    if not 0 <= at <= len(parent.tokens):
        raise InvalidRequest(f"fork at token {at}: the session has {len(parent.tokens)}")
    return at


def _of(groups: Sequence[CacheGroup], capabilities: frozenset[str], *, interior: bool) -> frozenset[str]:
    """Those of an engine's capabilities that it has of a model with these cache groups."""
    found = capabilities if interior else capabilities - {"interior-points"}
    if keeps_all(groups):
        found |= {"beside"}
    return (found - WITHOUT_STATES) | WITH_STATES if point_groups(groups) else found
