"""What a stored model is called: `thaw:NAME` to people and in settings, a folder to engines.

A repository that was moved or copied finds its models again, because it remembers them by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from thaw.core.errors import InvalidRequest
from thaw.engines.hf.stored import is_stored
from thaw.weights.folder import MODELS, SCHEME

if TYPE_CHECKING:
    from thaw.store import Store


def to_folder(store: Store | None, model: object) -> object:
    """What an engine is told of a model: for `thaw:NAME`, or the folder of a stored one, that folder, written again
    where it is not as the store has it. Others as they are. Raises `NotFound`, `InvalidRequest`."""
    if not isinstance(model, str):
        return model
    name = model.removeprefix(SCHEME) if model.startswith(SCHEME) else None
    if store is None:
        if name is None:
            return model
        raise InvalidRequest(f"{model} names a model in a repository, but none is here; name a folder or a hub id")
    name = name or _stored_name(store, model)
    if name is None:
        return model
    from thaw.weights.book import WeightsBook

    return str(WeightsBook(store).model(name))


def to_name(store: Store, model: object) -> object:
    """What the repository remembers of a model: of a stored one its name."""
    name = _stored_name(store, model) if isinstance(model, str) else None
    return model if name is None else SCHEME + name


def from_name(store: Store, model: object) -> object:
    """Where the folder of a remembered model lies; nothing is written."""
    if isinstance(model, str) and model.startswith(SCHEME):
        return str(store.path.resolve() / MODELS / model.removeprefix(SCHEME))
    return model


def _stored_name(store: Store, model: str) -> str | None:
    """The set that this folder is of, whether it is there or has to be written again."""
    path = Path(model)
    ours = path.parent == store.path.resolve() / MODELS and (is_stored(path) or not path.exists())
    return path.name if ours else None
