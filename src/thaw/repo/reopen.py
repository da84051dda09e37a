"""Take up a session where a snapshot left it: its place in history is what it was, not the snapshot's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thaw.core.ids import CommitId
from thaw.engines.base import Policy
from thaw.repo.hydrate import hydrate
from thaw.repo.resolve import ResolvedPoint
from thaw.repo.session import Session

if TYPE_CHECKING:
    from thaw.repo.repository import Repository


def reopen(
    repo: Repository,
    where: ResolvedPoint,
    *,
    parent: CommitId | None,
    branch: str | None,
    num_inherited: int = 0,
    seed: int | None = None,
    policy: Policy = "exact",
) -> Session:
    """The session at `where`; its next commit follows `parent` and moves `branch`. Raises what `Repository.session`
    raises."""
    context = repo._context
    with context.admission.beginning():
        live = hydrate(context, where, seed=seed, policy=policy)
        return Session(
            context, live.session, kept=live.kept, parent=parent, branch=branch, proof=live.proof,
            num_inherited=num_inherited,
        )  # fmt: skip
