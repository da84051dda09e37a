"""Which repository: -C PATH, else THAW_REPO, else the nearest .thaw at or above the current folder; and which namespace
of it: --namespace, else THAW_NAMESPACE, else the default one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from thaw.core.errors import InvalidRequest, NotFound
from thaw.data.files import storage_errors

if TYPE_CHECKING:
    from thaw.repo.repository import Repository

FOLDER = ".thaw"
NAMESPACE = "THAW_NAMESPACE"
HOW = "Create one with `thaw init`, or name one with -C PATH or THAW_REPO."


def is_repository(path: Path) -> bool:
    """Whether a repository is or was here; one that lost its database still has its packs. Raises `StorageFailed` where
    that cannot be seen."""
    with storage_errors(str(path)[:200], "look into"):
        return (path / "thaw.db").is_file() or (path / "packs").is_dir()


def find(named: str | None) -> Path:
    """The repository's folder. Raises `NotFound` saying how to make or name one."""
    chosen = named or os.environ.get("THAW_REPO")
    return _named(Path(chosen).expanduser()) if chosen else _nearest(Path.cwd())


def _named(path: Path) -> Path:
    for candidate in (path, path / FOLDER):
        if is_repository(candidate):
            return candidate
    raise NotFound(f"there is no repository in {path} or {path / FOLDER}. Create one with `thaw init {path}`.")


def _nearest(start: Path) -> Path:
    for folder in (start, *start.parents):
        if is_repository(folder / FOLDER):
            return folder / FOLDER
    raise NotFound(f"there is no repository in {start} or above it. {HOW}")


def namespace() -> str | None:
    """The namespace that was asked for; None is the default one."""
    return os.environ.get(NAMESPACE) or None


def require_sessions() -> None:
    """Raises `InvalidRequest` in the namespace of the repository's weights, for verbs that change branches and tags:
    there a tag is a weights set, and a commit of somebody's may need it."""
    if namespace() is None:
        return
    from thaw.weights.record import NAMESPACE as WEIGHTS

    if namespace() == WEIGHTS:
        raise InvalidRequest(
            f"the namespace {WEIGHTS} holds the repository's weights. Add a set with `thaw weights add`, and remove "
            "one with `thaw weights rm NAME`, which refuses while a commit needs it."
        )


def open_repository(named: str | None) -> Repository:
    """The repository without an engine: to look at it, and to move refs."""
    from thaw.repo.repository import open as open_at

    return open_at(find(named), create=False, namespace=namespace())
