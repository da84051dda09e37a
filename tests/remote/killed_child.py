"""A host whose process ends at its n-th request to the remote: `killed_child.py VERB REPO BUCKET N`.

The request is made first where N is even. Ends with 0 where there were fewer requests. VERB is push, fetch, gc, clone,
delete:BRANCH or forget:BRANCH. With `killed_child.py serve`, such lines come from stdin, each in a process that is
forked off; where N is below 0 it is killed after so many milliseconds. "killed" or "done" is printed for each.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from hosts import remote, wish

from thaw.remote.clone import clone
from thaw.remote.fetch import fetch
from thaw.remote.folder import FolderBucket
from thaw.remote.forget import forget
from thaw.remote.gc import GcWish, collect
from thaw.remote.push import PushWish, Tuning, push
from thaw.remote.settings import RemoteSettings
from thaw.store import Store

SMALL = Tuning(pack_bytes=32 << 10, uploads=2, workers=4)
AT_ONCE = GcWish(grace_s=0.0, keep_reflog_s=0.0)
ASKED = ("read", "read_ranges", "size", "put", "create", "swap", "delete")


class Mortal(FolderBucket):
    """Counts requests; at one of them the process is killed."""

    def __init__(self, root: Path, last: int) -> None:
        super().__init__(root)
        self._number, self._last, self._lock = 0, last, threading.Lock()
        for name in ASKED:
            setattr(self, name, self._counted(getattr(self, name)))

    def _counted(self, ask):  # type: ignore[no-untyped-def]
        def counted(*args: object) -> object:
            with self._lock:
                self._number += 1
                ends = self._number == self._last
            if ends and self._last % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            done = ask(*args)
            if ends:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        return counted


def main(verb: str, repo: str, bucket: str, last: str) -> None:
    there = remote(Mortal(Path(bucket), int(last)))
    if verb == "clone":
        clone(Path(repo), there, RemoteSettings(url=Path(bucket).as_uri()))
        return
    with Store.open(Path(repo)) as store:
        if verb == "push":
            print(push(store, there, [wish(store, ref.name) for ref in store.refs("branch")], tuning=SMALL).nbytes)
        elif verb == "fetch":
            print(fetch(store, there, workers=4, group_bytes=64 << 10).nbytes)
        elif verb == "gc":
            collect(there, AT_ONCE)
        elif verb.startswith("forget:"):
            forget(there, [("branch", verb.partition(":")[2])], workers=4)
        else:
            push(store, there, [PushWish("branch", verb.partition(":")[2], None)], tuning=SMALL)


def serve() -> None:
    """Nothing of thaw runs in this process, so what is forked off it starts clean."""
    for line in sys.stdin:
        words = line.split()
        child = os.fork()
        if not child:
            os.dup2(2, 1)
            code = 1
            try:
                main(*words)
                code = 0
            except BaseException:  # noqa: BLE001 - said, and seen by the code
                traceback.print_exc()
            os._exit(code)
        if int(words[3]) < 0:
            time.sleep(-int(words[3]) / 1000)
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print({0: "done", -signal.SIGKILL: "killed"}.get(code, f"failed {code}"), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        main(*sys.argv[1:])
