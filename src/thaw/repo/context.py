"""What the porcelain's objects share: one store, at most one engine, and the ids of nodes already written.

Repositories, sessions and groups hold a `Context` and nothing of one another. The engine is booted on first use when
it was given by name; verbs that only read never touch it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from thaw.core.errors import InvalidRequest
from thaw.core.ids import ObjectId
from thaw.core.objects import SegmentNode, TurnNode
from thaw.repo import settings
from thaw.repo.encoded import EncodedTexts
from thaw.repo.guard import ProcessBound
from thaw.repo.settings import EngineSettings
from thaw.store import Store

if TYPE_CHECKING:
    from thaw.data.locations import StoreMount
    from thaw.engines.base import Engine
    from thaw.repo.admission import Admission

MEMO_ENTRIES = 4096


class Context(ProcessBound):
    """Safe from any thread; bound to its process."""

    def __init__(
        self, store: Store, engine: Engine | EngineSettings | None = None, *, of: Context | None = None
    ) -> None:
        """`of`: whose store and engine these are; that one boots the engine, and closes both."""
        super().__init__("repository")
        self._of = of
        self._store = store
        self._engine = engine
        self._own_engine: Engine | None = None
        self._lock = threading.Lock()
        self._node_ids: OrderedDict[SegmentNode | TurnNode, ObjectId] = OrderedDict()
        self._remembered = False
        self._admission: Admission | None = None
        self._encoded: EncodedTexts = EncodedTexts() if of is None else of._encoded

    def encode_chat(self, text: str) -> tuple[int, ...]:
        """A rendered conversation's tokens; those of the namespace's last ones are remembered."""
        return self._encoded.encode(self.engine.codec, self._store.namespace, text)

    @property
    def admission(self) -> Admission:
        """What is live through it; a namespace's is the whole repository's."""
        if self._of is not None:
            return self._of.admission
        from thaw.repo.admission import Admission  # only for those who run something

        with self._lock:
            self._admission = self._admission or Admission()
            return self._admission

    def within(self, namespace: str) -> Context:
        """The same store and engine in a namespace; to close it closes neither."""
        return Context(self.store.within(namespace), self._engine, of=self)

    @property
    def store(self) -> Store:
        self.check_process()
        return self._store

    @property
    def mount(self) -> StoreMount:
        """The repository as an engine reaches it: its own folder of packs is the only tier."""
        from thaw.data.tiers.folder import folder_mount  # only for those who read or write KV

        return folder_mount(self.store.uuid, self.store.packs)

    @property
    def engine(self) -> Engine:
        """The engine. Raises `InvalidRequest` when the repository was opened without one."""
        self.check_process()
        if self._of is not None:
            return self._of.engine
        with self._lock:
            if isinstance(self._engine, EngineSettings):
                from thaw.engines import load_engine

                self._own_engine = load_engine(self._engine.name, **self._told(self._engine.options))
                self._engine = self._own_engine
            if self._engine is None:
                raise InvalidRequest(
                    "this needs an engine and the repository was opened without one. "
                    "Open it with thaw.open(path, engine=thaw.load_engine(…))."
                )
            return self._engine

    def _told(self, options: dict[str, object]) -> dict[str, Any]:
        """`options` as the engine takes them: a stored model by its folder."""
        from thaw.weights.names import to_folder

        return {**options, "model": to_folder(self.store, options["model"])} if "model" in options else dict(options)

    @property
    def has_engine(self) -> bool:
        return self._engine is not None

    def remember_engine(self) -> None:
        """Write down the engine's name and options; after the first time this costs nothing."""
        if not self._remembered:
            settings.remember(self.store, settings.of_engine(self.engine))
            self._remembered = True

    def node_id(self, node: SegmentNode | TurnNode) -> ObjectId | None:
        """The id of a node that this context has stored, else None. Full nodes repeat in every commit: hashed once."""
        with self._lock:
            known = self._node_ids.get(node)
            if known is not None:
                self._node_ids.move_to_end(node)
            return known

    def keep_node_id(self, node: SegmentNode | TurnNode, identifier: ObjectId) -> None:
        """Note that `node` is stored. Call after its transaction committed."""
        with self._lock:
            self._node_ids[node] = identifier
            while len(self._node_ids) > MEMO_ENTRIES:
                self._node_ids.popitem(last=False)

    def forget_node_ids(self) -> None:
        """Trust nothing remembered: the store said that something is gone."""
        with self._lock:
            self._node_ids.clear()

    def close(self) -> None:
        """Close the store, and the engine if it was booted here, unless they are another's. Closing twice is fine."""
        self.check_process()
        if self._of is not None:
            return
        self._store.close()
        if self._own_engine is not None:
            self._own_engine.close()
