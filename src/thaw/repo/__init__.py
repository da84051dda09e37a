"""The porcelain: repositories, sessions, groups, and git's verbs over them.

One file a concept. Nothing here loads torch or an engine; verbs that only read need neither. Names load on first use,
so that a verb which reads one commit does not pay for all the others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thaw.repo.admission import Drained
    from thaw.repo.chat import ChatResult
    from thaw.repo.commit import CommitConflict, CommitResult
    from thaw.repo.diff import Diff, Side
    from thaw.repo.drain import DrainReport
    from thaw.repo.group import Group
    from thaw.repo.log import LogEntry
    from thaw.repo.rebase import Rebase
    from thaw.repo.report import Continuation, LawResult, VerifyReport
    from thaw.repo.repository import Repository, clone, init, open
    from thaw.repo.resolve import ResolvedPoint
    from thaw.repo.session import Session
    from thaw.repo.settings import EngineSettings
    from thaw.repo.show import Shown
    from thaw.repo.sleep import SleepReport, WakeReport
    from thaw.repo.stream import Stream
    from thaw.repo.trajectory import Trajectory

_HOME = {
    "ChatResult": "chat",
    "CommitConflict": "commit",
    "CommitResult": "commit",
    "Continuation": "report",
    "Diff": "diff",
    "DrainReport": "drain",
    "Drained": "admission",
    "EngineSettings": "settings",
    "Group": "group",
    "LawResult": "report",
    "LogEntry": "log",
    "Rebase": "rebase",
    "Repository": "repository",
    "ResolvedPoint": "resolve",
    "Session": "session",
    "Shown": "show",
    "Side": "diff",
    "SleepReport": "sleep",
    "Stream": "stream",
    "Trajectory": "trajectory",
    "VerifyReport": "report",
    "WakeReport": "sleep",
    "clone": "repository",
    "init": "repository",
    "open": "repository",
}

__all__ = [
    "ChatResult",
    "CommitConflict",
    "CommitResult",
    "Continuation",
    "Diff",
    "DrainReport",
    "Drained",
    "EngineSettings",
    "Group",
    "LawResult",
    "LogEntry",
    "Rebase",
    "Repository",
    "ResolvedPoint",
    "Session",
    "Shown",
    "Side",
    "SleepReport",
    "Stream",
    "Trajectory",
    "VerifyReport",
    "WakeReport",
    "clone",
    "init",
    "open",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'thaw.repo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"thaw.repo.{home}"), name)
