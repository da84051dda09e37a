"""`snapshot_worker.py`, with its errors in a file of their own: `python -m quiet_worker MODE PLAN.json ERRORS`.

A forked process of multiprocessing waits for its children at its end and runs no `atexit` function, by which vLLM ends
them: they are run here.
"""

from __future__ import annotations

import atexit
import os
import runpy
import sys

with open(sys.argv.pop(), "ab") as errors:
    os.dup2(errors.fileno(), 2)
try:
    runpy.run_module("snapshot_worker", run_name="__main__", alter_sys=True)
finally:
    atexit._run_exitfuncs()
