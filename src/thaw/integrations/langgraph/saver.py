"""A LangGraph checkpointer in a thaw repository: KV lives as long as the checkpoints that name it.

Messages of a checkpoint name the points that they end at. Each such point has a tag of the thread's as long as a
checkpoint of the thread names it (`keeping`): `copy_thread` gives the copy tags of its own, and `delete_thread`,
`delete_for_runs` and `prune` drop those that nothing in the thread names any more, so that `repo.gc` frees their KV.
Checkpoints themselves are in `langgraph.db` in the repository's folder (`checkpoints`). What returned is on disk.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
    get_checkpoint_id,
    get_checkpoint_metadata,
)
from langgraph.checkpoint.serde.base import SerializerProtocol

from thaw.core.errors import InvalidRequest
from thaw.core.text import require_text
from thaw.integrations.langgraph import keeping
from thaw.integrations.langgraph.checkpoints import CheckpointFile, CheckpointKey, CheckpointRow, WriteRow
from thaw.integrations.langgraph.messages import points_in
from thaw.repo import Repository
from thaw.repo import open as open_repository
from thaw.repo.aio import AsyncRepository
from thaw.repo.bridge import call

STRATEGIES = ("keep_latest", "delete")
COUNTERS = "counters_since_delta_snapshot"
"""Of a checkpoint's metadata: the delta channels whose value is in the writes of those before it."""


class ThawSaver(BaseCheckpointSaver[str]):
    """Give it to `graph.compile(checkpointer=…)`. Safe from any thread, and beside savers of other processes.

    `repo`: an open repository (which stays open), or the path of one, made where there is none. `serde`: LangGraph's
    serialiser; an encrypted one works, since points are read before values are written. Leaving its `with` closes it.
    """

    def __init__(
        self, repo: Repository | AsyncRepository | str | Path, *, serde: SerializerProtocol | None = None
    ) -> None:
        super().__init__(serde=serde)
        given = repo.sync if isinstance(repo, AsyncRepository) else repo
        self._owned = not isinstance(given, Repository)
        self.repo: Repository = given if isinstance(given, Repository) else open_repository(given, create=True)
        self._file = CheckpointFile(self.repo.path, self.repo.namespace)
        keeping.reconcile(self.repo.store, self._file)

    def close(self) -> None:
        """Close the file of checkpoints, and the repository where it was opened here."""
        self._file.close()
        if self._owned:
            self.repo.close()

    def __enter__(self) -> ThawSaver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> ThawSaver:
        return self

    async def __aexit__(self, *_: object) -> None:
        await call(self.close)

    # -- reading

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint that `config` names, or the thread's newest; None where there is none."""
        thread, ns = _thread(config), _ns(config)
        id = get_checkpoint_id(config)
        with self._file.reading():
            key = CheckpointKey(thread, ns, id) if id else self._file.newest(thread, ns)
            return None if key is None else self._read(key)

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Of a thread or, without `config`, of all, newest first. `filter`: values that the metadata must have."""
        place = {} if config is None else config.get("configurable", {})
        keys = self._file.keys(
            thread=None if config is None else _thread(config),
            ns=place.get("checkpoint_ns"),
            id=get_checkpoint_id(config) if config is not None else None,
            before=get_checkpoint_id(before) if before is not None else None,
        )
        if config is None:
            keys.sort(key=lambda key: key.id, reverse=True)
        num_left = len(keys) if limit is None else limit
        for key in keys:
            if num_left <= 0:
                return
            with self._file.reading():
                found = self._read(key, filter or {})
            if found is not None:
                num_left -= 1
                yield found

    def _read(self, key: CheckpointKey, filter: Mapping[str, Any] | None = None) -> CheckpointTuple | None:
        """None where it is gone, or its metadata is not as `filter` says."""
        row = self._file.get(key)
        if row is None:
            return None
        about = self.serde.loads_typed(row.about)
        if any(about.get(name) != value for name, value in (filter or {}).items()):
            return None
        checkpoint: Checkpoint = self.serde.loads_typed(row.data)
        checkpoint["channel_values"] = {
            name: self.serde.loads_typed(value) for name, value in self._file.values(key).items()
        }
        writes = [(one.task, one.channel, self.serde.loads_typed(one.value)) for one in self._file.writes(key)]
        return CheckpointTuple(
            config=_config(key),
            checkpoint=checkpoint,
            metadata=about,
            parent_config=None if row.parent is None else _config(CheckpointKey(key.thread, key.ns, row.parent)),
            pending_writes=writes,
        )

    # -- writing

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint, and keep the points that it names. On disk on return."""
        thread, place = _thread(config), config["configurable"]
        key = CheckpointKey(thread, _ns(config), checkpoint["id"])
        about = get_checkpoint_metadata(config, metadata)
        row = CheckpointRow(
            key=key,
            parent=place.get("checkpoint_id"),
            run=None if about.get("run_id") is None else _name(about["run_id"], "run_id"),
            data=self.serde.dumps_typed({k: v for k, v in checkpoint.items() if k != "channel_values"}),
            about=self.serde.dumps_typed(about),
        )
        values = {name: self.serde.dumps_typed(value) for name, value in checkpoint["channel_values"].items()}
        named = points_in(checkpoint["channel_values"])
        with self._file.writing():
            self._file.put(row, values, self._held(thread, named))
        return _config(key)

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Store what a task wrote, and keep the points that it names. On disk on return."""
        thread, place = _thread(config), config["configurable"]
        key = CheckpointKey(thread, _ns(config), place["checkpoint_id"])
        rows = [
            WriteRow(
                task=task_id, idx=WRITES_IDX_MAP.get(channel, i), channel=channel, path=task_path,
                value=self.serde.dumps_typed(value),
            )
            for i, (channel, value) in enumerate(writes)
        ]  # fmt: skip
        named = points_in([value for _, value in writes])
        with self._file.writing():
            self._file.put_writes(key, rows, self._held(thread, named))

    def _held(self, thread: str, named: set[str]) -> set[str]:
        """Those of `named` that are kept for the thread from here on."""
        if not named:
            return named
        known = named & self._file.points(thread)
        return known | keeping.hold(self.repo.store, thread, named - known)

    # -- copying and deleting

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """All checkpoints of a thread, as another thread's, which keeps their points too."""
        source, target = _name(source_thread_id, "thread_id"), _name(target_thread_id, "thread_id")
        if source == target:
            return
        with self._file.writing():
            keeping.hold(self.repo.store, target, self._file.points(source))
            self._file.copy(source, target)

    def delete_thread(self, thread_id: str) -> None:
        thread_id = _name(thread_id, "thread_id")
        with self._file.writing():
            named = self._file.points(thread_id)
            self._file.delete_thread(thread_id)
        self._release({thread_id: named})

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        with self._file.writing():
            named = self._delete(self._file.keys_of_runs([_name(run, "run_id") for run in run_ids]))
        self._release(named)

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """`keep_latest` keeps the newest checkpoint of each namespace, and of those before it what a `DeltaChannel`
        is read from; `delete` keeps none. Raises `InvalidRequest` for any other strategy."""
        if strategy not in STRATEGIES:
            raise InvalidRequest(f"strategy={strategy!r}: must be one of {', '.join(STRATEGIES)}")
        if strategy == "delete":
            for thread in thread_ids:
                self.delete_thread(thread)
            return
        with self._file.writing():
            named = self._delete([key for thread in thread_ids for key in self._superseded(_name(thread, "thread_id"))])
        self._release(named)

    def _superseded(self, thread: str) -> Sequence[CheckpointKey]:
        keys = self._file.keys(thread=thread)
        newest: dict[str, CheckpointKey] = {}
        for key in keys:
            newest.setdefault(key.ns, key)
        kept = {one for key in newest.values() for one in self._read_from(key)}
        return [key for key in keys if key not in kept]

    def _read_from(self, key: CheckpointKey) -> Iterator[CheckpointKey]:
        """The checkpoint, and those whose writes its delta channels are made of, back to their snapshots."""
        row = self._file.get(key)
        open_channels: set[str] = set() if row is None else set(self.serde.loads_typed(row.about).get(COUNTERS) or ())
        while row is not None:
            yield row.key
            open_channels -= self._file.channels(row.key)
            if not open_channels or row.parent is None:
                return
            row = self._file.get(CheckpointKey(key.thread, key.ns, row.parent))

    def _delete(self, keys: Sequence[CheckpointKey]) -> dict[str, set[str]]:
        """Delete checkpoints; by thread, the points that their threads named before."""
        named = {key.thread: self._file.points(key.thread) for key in keys}
        self._file.delete(keys)
        return named

    def _release(self, named: dict[str, set[str]]) -> None:
        """Once the checkpoints are gone for good, in a transaction of its own: a kill before leaves tags, not holes."""
        with self._file.writing():
            for thread, points in named.items():
                keeping.release(self.repo.store, thread, points - self._file.points(thread))

    # -- asyncio: the same, on threads of thaw's

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return await call(self.get_tuple, config)

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        found = self.list(config, filter=filter, before=before, limit=limit)
        while (one := await call(next, found, None)) is not None:
            yield one

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        return await call(self.put, config, checkpoint, metadata, new_versions)

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        await call(self.put_writes, config, writes, task_id, task_path)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        await call(self.copy_thread, source_thread_id, target_thread_id)

    async def adelete_thread(self, thread_id: str) -> None:
        await call(self.delete_thread, thread_id)

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        await call(self.delete_for_runs, run_ids)

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        await call(self.prune, thread_ids, strategy=strategy)

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        return await call(self.get_delta_channel_history, config=config, channels=channels)

    def get_next_version(self, current: str | None, channel: None) -> str:
        """A version is later than the one before it, and another one in every branch."""
        number = 0 if current is None else int(str(current).partition(".")[0])
        return f"{number + 1:032}.{random.random():.16f}"


def _thread(config: RunnableConfig) -> str:
    thread = config.get("configurable", {}).get("thread_id")
    if thread is None:
        raise InvalidRequest('the config names no thread; give {"configurable": {"thread_id": …}}')
    return _name(thread, "thread_id")


def _ns(config: RunnableConfig) -> str:
    return _name(config["configurable"].get("checkpoint_ns") or "", "checkpoint_ns")


def _name(value: object, what: str) -> str:
    """As LangGraph's own savers take them: 7 and "7" are one thread. Raises `InvalidRequest` for what is no text."""
    return require_text(str(value), what)


def _config(key: CheckpointKey) -> RunnableConfig:
    place = {"thread_id": key.thread, "checkpoint_ns": key.ns, "checkpoint_id": key.id}
    return {"configurable": place}
