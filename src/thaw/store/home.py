"""What the store's parts need of it, without its verbs: where it lies, which one it is, and its database."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from thaw.store.db import Database
from thaw.store.saving import Saver
from thaw.store.upkeep import Upkeep


class StoreHome(Protocol):
    path: Path
    packs: Path
    uuid: str
    database: Database


class NamespaceHome(StoreHome, Protocol):
    """A store as one namespace of it is written."""

    namespace: str
    upkeep: Upkeep
    saver: Saver
