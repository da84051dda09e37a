"""Take up a session where a snapshot left it: its place in history is what it was, not the snapshot's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thaw.core.ids import CommitId
from thaw.engines.base import Policy
from thaw.repo.context import Context
from thaw.repo.hydrate import hydrate
from thaw.repo.resolve import ResolvedPoint
from thaw.repo.session import Session
from thaw.store import Store

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
    source: Store | None = None,
    beside: Session | None = None,
) -> Session:
    """The session at `where`; its next commit follows `parent` and moves `branch`. `source`: the store that has it, if
    it is not the repository's own: its next commit then writes all. `beside`: as with `hydrate`. Raises what
    `Repository.session` raises."""
    context = repo._context
    with context.admission.beginning():
        live = hydrate(
            context if source is None else Context(source, context.engine), where, seed=seed, policy=policy,
            beside=None if beside is None else beside.ref,
        )  # fmt: skip
        kept = live.kept if source is None else None
        return Session(
            context, live.session, kept=kept, parent=parent, branch=branch, proof=live.proof,
            num_inherited=num_inherited,
        )  # fmt: skip
