"""Which engine a repository was last used with, so that the command line can boot the same again.

Kept as one JSON setting of the store: {"name": …, "options": {…}}. Options are what `load_engine` was given; values
that JSON cannot hold are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from thaw.core.errors import CorruptDatabase
from thaw.store import Store

if TYPE_CHECKING:
    from thaw.engines.base import Engine

KEY = "engine"


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's name in the registry and the options to boot it with."""

    name: str
    options: dict[str, object] = {}


def of_engine(engine: Engine) -> EngineSettings:
    """How to boot an engine like this one. Engines that keep their `options` say it themselves."""
    options = getattr(engine, "options", None)
    if not isinstance(options, Mapping):
        options = {"model": engine.info.model} if engine.info.model else {}
    return EngineSettings(name=engine.info.name, options={k: v for k, v in options.items() if _is_json(v)})


_DECODER = msgspec.json.Decoder(EngineSettings)


def recall(store: Store) -> EngineSettings | None:
    """The remembered settings, or None in a repository that no engine has used."""
    text = store.get_setting(KEY)
    if text is None:
        return None
    try:
        found = _DECODER.decode(text)
    except msgspec.DecodeError as error:
        raise CorruptDatabase(f"the setting {KEY!r} of {store.path} is damaged: {error}. Name the engine.") from None
    return _with_model(found, lambda model: _names().from_name(store, model))


def remember(store: Store, settings: EngineSettings) -> None:
    """Write `settings` if they differ from what is there. A model that lies in the store is remembered by its name."""
    if recall(store) != settings:
        named = _with_model(settings, lambda model: _names().to_name(store, model))
        store.set_setting(KEY, msgspec.json.encode(named).decode())


def _with_model(settings: EngineSettings, change: Callable[[object], object]) -> EngineSettings:
    model = settings.options.get("model")
    if model is None or change(model) == model:
        return settings
    return msgspec.structs.replace(settings, options={**settings.options, "model": change(model)})


def _names() -> Any:
    from thaw.weights import names  # only for those who know a model

    return names


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
