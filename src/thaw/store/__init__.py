"""The store: refs, reflog, objects, blob index, transactions, gc and fsck of one local repository."""

from __future__ import annotations

from thaw.store.fsck import FsckReport, fsck
from thaw.store.gc import GcReport
from thaw.store.refs import Ref, ReflogEntry, RefUpdate
from thaw.store.store import Store
from thaw.store.transaction import Transaction

__all__ = ["FsckReport", "GcReport", "Ref", "RefUpdate", "ReflogEntry", "Store", "Transaction", "fsck"]
