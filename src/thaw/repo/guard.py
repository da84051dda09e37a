"""Objects know the process they were made in.

A repository, session or group holds locks, a database connection and an engine's threads. None of these survive
`os.fork`, so use in a forked child is refused by name instead of hanging or writing twice.
"""

from __future__ import annotations

import os

from thaw.core.errors import InvalidRequest


class ProcessBound:
    """Base of objects that belong to one process."""

    def __init__(self, what: str) -> None:
        self._pid = os.getpid()
        self._what = what

    def check_process(self) -> None:
        """Raise `InvalidRequest` in any process but the one that made this object."""
        here = os.getpid()
        if here != self._pid:
            raise InvalidRequest(
                f"this {self._what} was made in process {self._pid} and is used in process {here}, which was forked "
                "from it. Open the repository (and an engine) again in the new process, or start it with 'spawn'."
            )
