"""Which engine: the one named here, else the one the repository remembers. Booting is the slow part, so it shows.

An engine is remembered by the options that boot it, or by the `url` of a server to join (`thaw up`, `--engine URL`).

The engine's own bars and warnings are turned off by environment variables before it is imported; what the user set
stays as it is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from thaw.cli import place
from thaw.cli.progress import Progress
from thaw.core.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from thaw.engines.base import Engine
    from thaw.engines.kind import EngineKind
    from thaw.repo.settings import EngineSettings
    from thaw.store import Store

URL = "url"
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def hush() -> None:
    """No bars and advice from the libraries below; THAW_DEBUG leaves them on."""
    if os.environ.get("THAW_DEBUG"):
        return
    import warnings

    from thaw.engines.registry import kinds

    for settings in (_QUIET, *(kind.quiet for kind in kinds())):
        for name, value in settings.items():
            os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|huggingface_hub)\b")


def choose(
    store: Store | None, name: str | None, model: str | None, dtype: str | None = None, device: str | None = None
) -> EngineSettings:
    """The engine to boot. Options given here replace the remembered ones of the same engine; the model is any's."""
    from thaw.engines import registry
    from thaw.repo import settings

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
            f"--engine {registry.DEFAULT} or another; the repository remembers that one then"
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
    return settings.EngineSettings(name=chosen, options=options)


def _known(name: str) -> EngineKind | None:
    """None for an engine that is not known here: loading it says so."""
    from thaw.engines.registry import available, kind_of

    return kind_of(name) if name in available() else None


def choose_anywhere(
    named: str | None, name: str | None, model: str | None, dtype: str | None = None, device: str | None = None
) -> EngineSettings:
    """As `choose`, where a repository is not needed: of the one that is there, if any."""
    try:
        path: Path | None = place.find(named)
    except NotFound:
        if named is not None:
            raise
        path = None
    if path is None:
        return choose(None, name, model, dtype, device)
    with place.open_repository(str(path)) as repo:
        return choose(repo.store, name, model, dtype, device)


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


def boot(chosen: EngineSettings) -> Engine:
    """Load the engine, or join the one that runs, with progress."""
    from thaw.engines import load_engine

    hush()
    with Progress(f"{'joining' if URL in chosen.options else 'loading'} {label(chosen)}"):
        return load_engine(chosen.name, **chosen.options)


def label(chosen: EngineSettings) -> str:
    """What to call it in a line of text."""
    if URL in chosen.options:
        return f"the engine at {chosen.options[URL]}"
    model = str(chosen.options.get("model", ""))
    return os.path.basename(model.rstrip("/")) or f"engine {chosen.name}"


def _lasting(model: str) -> str:
    """A folder's absolute path, so that it is found from anywhere; a hub id as it is."""
    path = os.path.expanduser(model)
    return os.path.abspath(path) if os.path.isdir(path) or path.startswith((".", "/")) else path
