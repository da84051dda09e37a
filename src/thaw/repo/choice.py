"""Which engine a repository is to use: the one that is named, else the one that it remembers.

An engine is remembered by the options that boot it, or by the `url` of a server to join.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from thaw.core.errors import InvalidRequest

if TYPE_CHECKING:
    from thaw.engines.kind import EngineKind
    from thaw.repo.settings import EngineSettings
    from thaw.store import Store

URL = "url"


def choose(
    store: Store | None, name: str | None, model: str | None, dtype: str | None = None, device: str | None = None
) -> EngineSettings:
    """The engine to boot. Options given here replace the remembered ones of the same engine; the model is any's, and
    `thaw:NAME` one of the store's own."""
    from thaw.engines import registry
    from thaw.repo import settings
    from thaw.weights.names import to_folder

    known = settings.recall(store) if store is not None else None
    if name is not None and name.startswith(("http://", "https://")):
        return _joined(registry.engine_at(name), {URL: name.rstrip("/")}, model, dtype, device)
    chosen = name or (known.name if known else registry.DEFAULT)
    options: dict[str, object] = dict(known.options) if known and known.name == chosen else {}
    kind = _known(chosen)
    needs_model = kind is not None and kind.needs_model
    if known and needs_model and "model" in known.options:
        options.setdefault("model", known.options["model"])  # another engine for the same model
    if model is not None and name is None and kind is not None and not kind.takes_model:
        raise InvalidRequest(
            f"the repository remembers the engine {chosen!r}, which loads no model: say which one loads {model}, with "
            f"--engine {registry.DEFAULT} or another; the repository then remembers that one"
        )
    if model is not None:
        options = {"model": _lasting(model)}
    if URL in options:
        return _joined(chosen, options, model, dtype, device)
    options |= {key: value for key, value in (("dtype", dtype), ("device", device)) if value is not None}
    if needs_model and "model" not in options:
        raise InvalidRequest(
            "no model was named yet. Give one with --model PATH (a folder with config.json and safetensors); the "
            "repository remembers it. Without one at hand, `thaw demo` fetches a small one."
        )
    if "model" in options:
        options["model"] = to_folder(store, options["model"])
    return settings.EngineSettings(name=chosen, options=options)


def _known(name: str) -> EngineKind | None:
    """None for an engine that is not known here: loading it says so."""
    from thaw.engines.registry import available, kind_of

    return kind_of(name) if name in available() else None


def _joined(
    name: str, options: dict[str, object], model: str | None, dtype: str | None, device: str | None
) -> EngineSettings:
    """An engine that runs already; how to load it is no longer to be said."""
    from thaw.repo import settings

    if any(value is not None for value in (model, dtype, device)):
        raise InvalidRequest(
            f"the engine at {options[URL]} runs already: --model, --dtype and --device are for one that is loaded here"
        )
    return settings.EngineSettings(name=name, options=options)


def _lasting(model: str) -> str:
    """A folder's absolute path, so that it is found from anywhere; a hub id as it is."""
    path = os.path.expanduser(model)
    return os.path.abspath(path) if os.path.isdir(path) or path.startswith((".", "/")) else path
