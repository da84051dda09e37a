"""The porcelain: repositories, sessions, groups, and git's verbs over them.

One file a concept. Nothing here loads torch or an engine; verbs that only read need neither.
"""

from __future__ import annotations

from thaw.repo.chat import ChatResult
from thaw.repo.commit import CommitConflict, CommitResult
from thaw.repo.diff import Diff, Side
from thaw.repo.group import Group
from thaw.repo.log import LogEntry
from thaw.repo.report import Continuation, LawResult, VerifyReport
from thaw.repo.repository import Repository, init, open
from thaw.repo.resolve import ResolvedPoint
from thaw.repo.session import Session
from thaw.repo.settings import EngineSettings
from thaw.repo.show import Shown
from thaw.repo.stream import Stream
from thaw.repo.trajectory import Trajectory

__all__ = [
    "ChatResult",
    "CommitConflict",
    "CommitResult",
    "Continuation",
    "Diff",
    "EngineSettings",
    "Group",
    "LawResult",
    "LogEntry",
    "Repository",
    "ResolvedPoint",
    "Session",
    "Shown",
    "Side",
    "Stream",
    "Trajectory",
    "VerifyReport",
    "init",
    "open",
]
