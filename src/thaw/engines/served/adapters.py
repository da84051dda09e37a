"""Adapters in an engine: what each one is that requests run under, by its content.

An engine knows an adapter by a name or a number, and reads its folder when it is loaded, perhaps again after it was put
out of memory. The content is looked at when a request under it first comes, and belongs to the number from then on: a
folder that is written anew says nothing of what is loaded, so requests under it are refused.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

from thaw.core.errors import IdentityMismatch, InvalidRequest, ThawError, Unsupported
from thaw.engines.hf import adapter

MOST = 4096
"""Adapters that are remembered. Of one that was forgotten, changed files would be taken for what is loaded."""


class EngineAdapters:
    def __init__(self) -> None:
        self._known: dict[tuple[Hashable, str], tuple[object, str]] = {}

    def id_of(self, number: Hashable, folder: str) -> str:
        """The id of the adapter that the engine calls `number` and loaded from `folder`. Raises `Unsupported` where
        that cannot be known, or `ThawError` for what is no adapter's folder."""
        now = adapter.signature(Path(folder))
        known = self._known.get((number, folder))
        if known is None:
            if len(self._known) >= MOST:
                raise Unsupported(
                    f"requests came under {MOST:,} adapters, and this engine remembers the files of no more; start it "
                    "again"
                )
            known = self._known[(number, folder)] = self._look(now, folder)
        if known[0] != now:
            raise Unsupported(
                "the files of the request's adapter were changed after it was first used here, so what is loaded is "
                "not what they say: put changed weights into another folder, and load that under another name"
            )
        return known[1]

    def _look(self, now: object, folder: str) -> tuple[object, str]:
        try:
            found = adapter.id_of(Path(folder))
        except ThawError as error:
            raise Unsupported(f"the request's adapter is not in files that can be hashed: {error}") from None
        if adapter.signature(Path(folder)) != now:
            raise Unsupported("the files of the request's adapter change while they are read; try it again later")
        return now, found


def require_same(asked: str | None, runs: str | None) -> None:
    """Raise unless a request's message names the adapter under which the request runs."""
    if asked == runs:
        return
    if asked is None or runs is None:
        raise InvalidRequest(
            f"the request runs under adapter {runs} and its message says {asked} (None: the model alone); name one in "
            "both"
        )
    raise IdentityMismatch(
        f"the session is of adapter {asked}; what this engine has under that name now is {runs}. Load the session's "
        "adapter again under another name",
        field="adapter", stored=asked, running=runs,
    )  # fmt: skip


def require_source(source: str | None, asked: str | None) -> None:
    """Raise `IdentityMismatch` where a request goes on from KV of another adapter, or of none."""
    if source != asked:
        raise IdentityMismatch(
            f"the session's KV is of adapter {source}; the request runs under {asked} (None: the model alone), which "
            "would read KV that it did not compute. Open a session of its own under that adapter",
            field="adapter", stored=str(source), running=str(asked),
        )  # fmt: skip
