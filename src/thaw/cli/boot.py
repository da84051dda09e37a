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
from thaw.core.errors import NotFound
from thaw.repo.choice import URL as URL
from thaw.repo.choice import choose as choose

if TYPE_CHECKING:
    from thaw.engines.base import Engine
    from thaw.repo.settings import EngineSettings

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
