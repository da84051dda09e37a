"""A server as a process of its own: started in the background, waited for, ended.

It gets a session (and so a process group) of its own, a log file, and no terminal; it outlives the command that started
it. It is asked to end first (SIGTERM); what is left of its group after that is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from thaw.core.errors import EngineDied, TimedOut
from thaw.core.text import clean, one_line
from thaw.data.files import storage_errors
from thaw.serve.record import answers

EVERY_S = 0.5
POLITE_S = 30.0
TAIL_NBYTES = 8192
CAUSE_NBYTES, CAUSE_CHARS = 4 << 20, 600
ERROR = re.compile(
    r"(?:\([^()]*\) )?(?:ERROR \S+ \S+ \[[^][]*\] |\[[^][]*\] )?"
    r"((?:\w+\.)*\w*(?:Error|Exception|Unsupported): .+)"
)
"""The line of a traceback that names the error, with what vLLM and SGLang write before it."""
FORMER_LOGS = 5
FORMER_NBYTES = 64 << 20


def start(command: list[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Begin it; both its outputs go to `log`, which only this user may read. The logs of those before are kept beside
    it (`keep_former`). `environment`: what is added to ours."""
    keep_former(log)
    with storage_errors(log, "write"):
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=fd, stderr=fd, start_new_session=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
    except OSError as error:
        raise EngineDied(f"{command[0]} could not be started: {error.strerror}") from None
    finally:
        os.close(fd)


def keep_former(log: Path) -> None:
    """Make room for a new log: the one before becomes `.1` (engine.log.1), that one `.2`, and so on. The oldest are
    removed beyond `FORMER_LOGS` of them, or `FORMER_NBYTES` in all; the one before is always kept."""
    names = [log, *(log.with_name(f"{log.name}.{i + 1}") for i in range(FORMER_LOGS))]
    with storage_errors(log, "keep the log before"):
        for older, newer in zip(reversed(names), reversed(names[:-1]), strict=False):
            if newer.exists():
                newer.replace(older)
        nbytes = 0
        for i, former in enumerate(names[1:]):
            nbytes += former.stat().st_size if former.exists() else 0
            if i and nbytes > FORMER_NBYTES:
                former.unlink(missing_ok=True)


class WaitDisplay(Protocol):
    """How a wait is shown: as long as the context lasts, `how_far` says what the server is doing."""

    def __call__(self, what: str, how_far: Callable[[], str], /) -> AbstractContextManager[object]: ...


def unseen(what: str, how_far: Callable[[], str]) -> AbstractContextManager[object]:
    """Nothing is shown."""
    return contextlib.nullcontext()


def wait(
    process: subprocess.Popen[bytes], url: str, log: Path, timeout_s: float, log_prefix: str = "",
    shown: WaitDisplay = unseen,
) -> float:  # fmt: skip
    """Seconds until it answered. Ends it and raises `EngineDied` or `TimedOut` when it does not, or on ^C.

    `log_prefix`: a regular expression; what it finds is left out of the log's lines that are shown meanwhile."""
    began = time.monotonic()
    try:
        with shown("starting the engine", lambda: _last(log, log_prefix)):
            while not answers(url):
                if process.poll() is not None:
                    raise EngineDied(f"the engine exited with code {process.returncode} while starting.\n{ending(log)}")
                if time.monotonic() - began > timeout_s:
                    raise TimedOut(f"the engine did not answer within {timeout_s:.0f} s (--timeout).\n{tail(log)}")
                time.sleep(EVERY_S)
    except BaseException:
        stop(process.pid, process)
        raise
    return time.monotonic() - began


def stop(pid: int, process: subprocess.Popen[bytes] | None = None, polite_s: float = POLITE_S) -> bool:
    """End the process group `pid`; whether it ended by itself when asked. `process`: when it is our own child."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    limit = time.monotonic() + polite_s
    while _group_runs(pid) and time.monotonic() < limit:
        if process is not None:
            process.poll()
        time.sleep(0.1)
    left = _group_runs(pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if process is not None:
        process.wait()
    return not left


def free_port(host: str) -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def is_taken(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def ending(log: Path) -> str:
    """The first error in the log, which engines log long before they end, then the log's end."""
    lines = tail(log)
    first = next(filter(None, map(ERROR.fullmatch, _lines(log, CAUSE_NBYTES))), None)
    if first is None or first[1][:200] in lines:
        return lines
    return f"  {clean(first[1])[:CAUSE_CHARS]}\n  …\n{lines}"


def tail(log: Path, lines: int = 8) -> str:
    """The end of the log, for an error, and where the rest is."""
    last = [clean(line)[:200] for line in _lines(log)][-lines:]
    return "\n".join([*(f"  {line}" for line in last), f"full log: {log}"])


def _last(log: Path, prefix: str) -> str:
    """What it is doing, in the words of its log."""
    found = _lines(log)
    return f"({one_line(re.sub(prefix, '', found[-1]), 60)})" if found else ""


def _lines(log: Path, nbytes: int = TAIL_NBYTES) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - nbytes))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]


def _group_runs(pid: int) -> bool:
    """Whether any process of the group is left; one that ended and was not waited for does not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == pid and fields[0] not in "ZX":
                return True
    return False
