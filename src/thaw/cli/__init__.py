"""The command `thaw`: one file a verb in `thaw.cli.verbs`, loaded only when that verb is run.

What the verbs share: `app` (which verbs there are), `main` (errors to exit codes), `output` (a terminal, a pipe or
JSON), `place` (which repository), `boot` (which engine), `options`. Nothing here keeps state between two commands; what
the command line remembers, it remembers in the repository.

Importing this package imports nothing else. `thaw --help` loads click and no verb; verbs that only read the repository
load no engine, no `rich`, and no click either (`light`). `python -m thaw.bench.startup` says what each costs.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Prints what went wrong; raises nothing but `SystemExit` from Python."""
    from thaw.cli.app import run

    code = run(arguments)
    if arguments is None:
        gc.freeze()  # the process ends: Python looks through everything for garbage then, an eighth of what `log` takes
    return code
