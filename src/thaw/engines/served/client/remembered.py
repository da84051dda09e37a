"""The identity of a model's files, kept for the next client: computing it again takes torch, transformers and seconds.

Kept beside the model's files (or in the user's cache folder) under the name, size and times of every one of them and
under whatever else it depends on: the versions that said it, and how the engine runs the model. Never of a hub id,
whose files lie elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from thaw._version import __version__
from thaw.core import canonical
from thaw.core.errors import Damaged
from thaw.core.identity import ModelIdentity
from thaw.core.ids import digest
from thaw.data.files import cache_dir, stamp

CACHE_NAME = ".thaw-identity.json"


def remembered(folder: Path, make: Callable[[], ModelIdentity], **how: object) -> ModelIdentity:
    """What `make` says of the model in `folder`, or said when the files and `how` were the same. `how`: all that `make`
    was given beside the folder, as values whose `repr` tells them apart."""
    if not folder.is_dir():
        return make()
    key = _key(folder, how)
    known = _recall(folder, key)
    if known is None:
        known = make()
        _remember(folder, key, known)
    return known


def _key(folder: Path, how: dict[str, object]) -> str:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith(".thaw")]
    stats = [(str(file.relative_to(folder)), *stamp(file)) for file in files]
    versions = [__version__]
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions.append(metadata.version("transformers"))
    said = [str(folder.resolve()), stats, versions, sorted((name, repr(value)) for name, value in how.items())]
    return digest(json.dumps(said).encode())


def _places(folder: Path) -> list[Path]:
    return [folder / CACHE_NAME, cache_dir() / "identities" / f"{digest(str(folder.resolve()).encode())[3:35]}.json"]


def _recall(folder: Path, key: str) -> ModelIdentity | None:
    """What `_remember` kept for `key`; None where there is none, or its file is damaged."""
    for path in _places(folder):
        with contextlib.suppress(OSError, ValueError, Damaged):
            first, _, rest = path.read_bytes().partition(b"\n")
            if first == key.encode():
                return canonical.decode(rest, ModelIdentity, "a remembered identity")
    return None


def _remember(folder: Path, key: str, identity: ModelIdentity) -> None:
    for path in _places(folder):
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(b"%s\n%s" % (key.encode(), canonical.encode(identity)))
            temporary.replace(path)
            return
