"""The children of one fork as a verb wants them: what each is asked, how it samples, and which branch it gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thaw.core.errors import InvalidRequest
from thaw.repo.refs import require_own

if TYPE_CHECKING:
    from thaw.repo.group import Group
    from thaw.repo.repository import Repository


@dataclass(frozen=True)
class Child:
    """One child's prompt, and how it samples."""

    prompt: str
    sampling: Any


def free_name(repo: Repository, name: str | None, n: int) -> str:
    """The branches' common name; checked before anything runs, so that no work is lost to a name."""
    taken = {ref.name for ref in repo.store.refs()}
    if name is not None:
        require_own(repo.store, f"{name}/{n - 1}")  # the longest one
        used = [f"{name}/{i}" for i in range(n) if f"{name}/{i}" in taken]
        if used:
            raise InvalidRequest(f"{', '.join(used[:4])} exist already; choose another --name, or delete them first.")
        return name
    i = 1
    while any(f"{_numbered(i)}/{k}" in taken for k in range(n)) or _numbered(i) in repo.remotes():
        i += 1
    return _numbered(i)


def _numbered(i: int) -> str:
    return "fork" if i == 1 else f"fork{i}"


def branches_of(prefix: str, wanted: list[Child]) -> list[str]:
    return [f"{prefix}/{i}" for i in range(len(wanted))]


def was_cut(group: Group) -> bool:
    turns = group[0].turns
    return bool(turns) and turns[-1].kind == "completion" and turns[-1].finish_reason is None
