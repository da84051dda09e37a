"""A session of a pool: a repository's session that knows its worker, and can be a point after its worker died.

It lives in the worker until `close`, until nobody holds it, or until the worker dies. `commit` writes it into the
pool's repository; without one it says so.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thaw.core.errors import InvalidRequest
from thaw.core.ids import CommitId
from thaw.core.proof import Proof
from thaw.core.sampling import Sampling
from thaw.engines.base import Completion, GenerateRequest, SessionRef, SessionView
from thaw.pool.history import History
from thaw.pool.stores import KeptIn
from thaw.repo.chat import Plan
from thaw.repo.commit import CommitResult
from thaw.repo.group import Group
from thaw.repo.session import Session
from thaw.repo.stream import Stream

if TYPE_CHECKING:
    from thaw.pool.workers.worker import Incarnation


class PoolSession(Session):
    """See the module. `kept_in`: the leading part of it that each of the pool's stores has."""

    def __init__(
        self,
        life: Incarnation,
        ref: SessionRef,
        *,
        kept: KeptIn | None = None,
        parent: CommitId | None = None,
        proof: Proof | None = None,
        history: History | None = None,
        num_inherited: int = 0,
    ) -> None:
        self.kept_in = kept or KeptIn()
        own = self.kept_in.by_store.get(life.context.store.uuid)
        super().__init__(life.context, ref, kept=own, parent=parent, proof=proof, num_inherited=num_inherited)
        self.life = life
        self.history = history
        self._last_ref = [ref]
        """What is closed at the end: a chat may have made this object another session of the engine's by then."""
        self._forget = weakref.finalize(self, _forget_last, life, self._last_ref)
        self._forget.atexit = False

    @property
    def worker(self) -> str:
        """The name of the worker that holds it."""
        return self.life.name

    @property
    def moved(self) -> bool:
        """Whether something was added to it since its round ended."""
        return self.history is None

    def append(self, text: str = "", **what: Any) -> SessionView:
        self.history = None
        return super().append(text, **what)

    def request(self, prompt: str, sampling: object, *, token_ids: Sequence[int] | None = None) -> GenerateRequest:
        self.history = None
        return super().request(prompt, sampling, token_ids=token_ids)

    def resume_stream(self) -> Stream[Completion]:
        self.history = None
        return super().resume_stream()

    def follow(self, plan: Plan, sampling: Sampling) -> GenerateRequest:
        self.history = None
        return super().follow(plan, sampling)

    def settle_chat(self, *, failed: bool) -> None:
        super().settle_chat(failed=failed)
        self._last_ref[0] = self._ref

    def _set_aside(self, keep: int) -> None:
        super()._set_aside(keep)
        self.kept_in = self.kept_in.cut(keep)
        self._last_ref[0] = self._ref

    def fork(self, n: int, at: int | None = None, replay: bool = False) -> Group:
        """N plain sessions in the same worker. A round (`pool.fork(session, n)`) is retried when the worker dies."""
        return super().fork(n, at, replay)

    def _commit(
        self, message: str, branch: str | None, meta: Mapping[str, str], expect: object, reason: str
    ) -> CommitResult:
        if not self.life.has_history:
            raise InvalidRequest(
                "the pool has no repository to commit to: ForkPool(…, repo=thaw.open(path)), or pass repo= a path"
            )
        return super()._commit(message, branch, dict(meta), expect, reason)  # type: ignore[arg-type]

    def close(self) -> None:
        """Forget it in its worker. Closing twice is fine, and so is closing after the worker died."""
        self._closed = True
        self._forget()


def _forget_last(life: Incarnation, refs: list[SessionRef]) -> None:
    life.forget(refs[0])
