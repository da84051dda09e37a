"""Which engine: the one named here, else the one the repository remembers. Booting is the slow part, so it shows.

The engine's own bars and warnings are turned off by environment variables before it is imported; what the user set
stays as it is.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from thaw.cli.progress import Progress
from thaw.core.errors import InvalidRequest

if TYPE_CHECKING:
    from thaw.engines.base import Engine
    from thaw.repo.settings import EngineSettings
    from thaw.store import Store

DEFAULT = "transformers"
NEEDS_MODEL = "transformers"
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

    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|huggingface_hub)\b")


def choose(
    store: Store | None, name: str | None, model: str | None, dtype: str | None = None, device: str | None = None
) -> EngineSettings:
    """The engine to boot. Options given here replace the remembered ones of the same engine."""
    from thaw.repo import settings

    known = settings.recall(store) if store is not None else None
    chosen = name or (known.name if known else DEFAULT)
    options: dict[str, object] = dict(known.options) if known and known.name == chosen else {}
    if model is not None:
        options = {"model": _lasting(model)}
    options |= {key: value for key, value in (("dtype", dtype), ("device", device)) if value is not None}
    if chosen == NEEDS_MODEL and "model" not in options:
        raise InvalidRequest(
            "no model was named yet. Give one with --model PATH (a folder with config.json and safetensors); the "
            "repository remembers it. Without one at hand, `thaw demo` fetches a small one."
        )
    return settings.EngineSettings(name=chosen, options=options)


def boot(chosen: EngineSettings) -> Engine:
    """Load the engine, with progress."""
    from thaw.engines import load_engine

    hush()
    with Progress(f"loading {label(chosen)}"):
        return load_engine(chosen.name, **chosen.options)


def label(chosen: EngineSettings) -> str:
    """What to call it in a line of text."""
    model = str(chosen.options.get("model", ""))
    return os.path.basename(model.rstrip("/")) or f"engine {chosen.name}"


def _lasting(model: str) -> str:
    """A folder's absolute path, so that it is found from anywhere; a hub id as it is."""
    path = os.path.expanduser(model)
    return os.path.abspath(path) if os.path.isdir(path) or path.startswith((".", "/")) else path
