"""A commit with its weights: those of the engine that runs are put into the repository first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from thaw.core.errors import IdentityMismatch, InvalidRequest
from thaw.core.ids import short
from thaw.weights import WeightsBook

if TYPE_CHECKING:
    from thaw.repo.context import Context


def keep_weights(context: Context) -> None:
    """That the weights of the engine's model are in the repository. Raises `InvalidRequest` where they are in no
    folder, `IdentityMismatch` where the folder's are others."""
    engine, book = context.engine, WeightsBook(context.store)
    running = engine.identity()
    if any(one.weights == running.weights for one in book.list()):
        return
    folder = Path(engine.info.model)
    if not folder.is_dir():
        raise InvalidRequest(
            f"the engine's model {engine.info.model or '(a module)'} is not a folder here, so its weights cannot be "
            "stored: add them from their folder (thaw weights add FOLDER), or commit without them"
        )
    name = folder.name
    if any(one.name == name for one in book.list()):
        name = f"{name}-{short(running.weights)}"
    added = book.add(folder, name, dtype=running.dtype)
    if added.entry.weights != running.weights:
        book.rm(name, force=True)
        raise IdentityMismatch(
            f"the files in {folder} have the weights {short(added.entry.weights)}; the engine runs "
            f"{short(running.weights)}: they changed since it was started, or it was updated in place. Nothing was "
            "committed; add the weights from their folder, or commit without them.",
            field="weights", stored=added.entry.weights, running=running.weights,
        )  # fmt: skip
