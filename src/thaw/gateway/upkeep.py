"""What follows commits, in a process of its own: `python -m thaw.gateway.upkeep REPOSITORY` puts small packs together.

On a thread of the gateway that is mostly Python, and requests would wait for the interpreter's lock at each of their
steps.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from thaw.data.fresh_process import with_this_thaw
from thaw.store import Store
from thaw.store.gather import gather
from thaw.store.upkeep import Upkeep

LEAST = 19
"""How nice that process is."""


class ProcessUpkeep(Upkeep):
    """As `Upkeep`, for the store in a folder. A process that does not run leaves the work to the thread; one that was
    killed leaves it to a later commit."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.command = [sys.executable, "-m", __name__, str(folder)]

    def begin(self, work: Callable[[], None]) -> None:
        gathers = isinstance(work, partial) and work.func is gather
        super().begin(partial(self._run, work) if gathers else work)

    def _run(self, work: Callable[[], None]) -> None:
        quiet = subprocess.DEVNULL
        try:
            done = subprocess.run(self.command, env=with_this_thaw(os.environ), stdin=quiet, stdout=quiet)
        except OSError:
            self._here(work)
            return
        if done.returncode > 0:
            self._here(work)

    def _here(self, work: Callable[[], None]) -> None:
        work()


def main() -> None:
    with contextlib.suppress(OSError):
        os.nice(LEAST)
    with Store.open(Path(sys.argv[1])) as store:
        gather(store)


if __name__ == "__main__":
    main()
