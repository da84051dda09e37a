"""The store: refs, reflog, objects, blob index, transactions, gc and fsck of one local repository.

Names load on first use: reading a ref does not pay for gc, fsck or a rebuild.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thaw.store.checkup import fsck
    from thaw.store.gc import GcReport
    from thaw.store.objects import Recorded
    from thaw.store.refs import Ref, ReflogEntry, RefUpdate
    from thaw.store.report import FsckReport
    from thaw.store.store import Store
    from thaw.store.transaction import Transaction

_HOME = {
    "FsckReport": "report",
    "GcReport": "gc",
    "Recorded": "objects",
    "Ref": "refs",
    "RefUpdate": "refs",
    "ReflogEntry": "refs",
    "Store": "store",
    "Transaction": "transaction",
    "fsck": "checkup",
}
__all__ = ["FsckReport", "GcReport", "Recorded", "Ref", "RefUpdate", "ReflogEntry", "Store", "Transaction", "fsck"]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'thaw.store' has no attribute {name!r}")
    return getattr(importlib.import_module(f"thaw.store.{home}"), name)
