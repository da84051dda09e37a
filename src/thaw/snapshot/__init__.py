"""A whole engine: its sessions, its queue and what it has given out, stored and brought back.

    queue = RequestQueue(repo, max_num_seqs=32)
    request = queue.submit(session, "Why?", Sampling(max_tokens=256), id="ask-1")
    snapshot(repo, "engine", queue=queue)                 # while it works

    restored = restore(repo, "engine")                    # in another process, from the store alone
    for piece in restored.queue.request("ask-1").stream(offset=17): ...

The process that holds the sessions is the one that can cut through all of them, so this is of that process: a program
with a repository and an engine. Names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thaw.snapshot.manifest import EngineSnapshot
    from thaw.snapshot.migration import Migrated, migrate
    from thaw.snapshot.outputs import OutputPiece
    from thaw.snapshot.queue import RequestQueue
    from thaw.snapshot.request import QueuedRequest
    from thaw.snapshot.restoring import RestoredEngine, restore
    from thaw.snapshot.ring import CheckpointRing, restore_checkpoint
    from thaw.snapshot.take import snapshot

_HOME = {
    "CheckpointRing": "ring",
    "EngineSnapshot": "manifest",
    "Migrated": "migration",
    "OutputPiece": "outputs",
    "QueuedRequest": "request",
    "RequestQueue": "queue",
    "RestoredEngine": "restoring",
    "migrate": "migration",
    "restore": "restoring",
    "restore_checkpoint": "ring",
    "snapshot": "take",
}

__all__ = [
    "CheckpointRing",
    "EngineSnapshot",
    "Migrated",
    "OutputPiece",
    "QueuedRequest",
    "RequestQueue",
    "RestoredEngine",
    "migrate",
    "restore",
    "restore_checkpoint",
    "snapshot",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'thaw.snapshot' has no attribute {name!r}")
    return getattr(importlib.import_module(f"thaw.snapshot.{home}"), name)
