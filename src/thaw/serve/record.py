"""The engine server that a repository started (`thaw up`): where it answers, which process it is.

Kept as one JSON setting of the store. The record is a claim, never trusted by itself: whether the process still is that
process is asked of the operating system (an id alone may be another's by now), whether it answers is asked of it.
"""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import msgspec

from thaw.core.errors import CorruptDatabase
from thaw.engines.kind import Start
from thaw.repo.settings import EngineSettings
from thaw.store import Store

KEY = "served"
HEALTH_S = 5.0


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """`born` tells the process from a later one with its id; `before` is the engine that the repository remembered.

    `log`, `config` (empty where it reads no file) and `mail` are paths on `host`."""

    engine: str
    url: str
    model: str
    pid: int
    born: str
    host: str
    log: str
    config: str
    mail: str
    started_ns: int
    before: EngineSettings | None = None

    @property
    def is_here(self) -> bool:
        """Whether it was started on this machine, so that its process can be looked at."""
        return self.host == socket.gethostname()


def begun(
    start: Start, pid: int, *, engine: str, url: str, model: str, log: Path, before: EngineSettings | None = None
) -> Served:
    """The record of a server that was just started here, as process `pid`."""
    return Served(
        engine=engine, url=url, model=model, pid=pid, born=born(pid), host=socket.gethostname(), log=str(log),
        config=start.config, mail=start.mail, started_ns=time.time_ns(), before=before,
    )  # fmt: skip


_RECORD: msgspec.json.Decoder[Served | None] = msgspec.json.Decoder(Served | None)


def recall(store: Store) -> Served | None:
    """The record, or None when nothing was started (or it was ended)."""
    text = store.get_setting(KEY)
    try:
        return None if text is None else _RECORD.decode(text)
    except msgspec.DecodeError as error:
        what = f"the setting {KEY!r} of {store.path} is damaged: {error}"
        raise CorruptDatabase(f"{what}. `thaw down` clears it.") from None


def remember(store: Store, served: Served | None) -> None:
    """Write the record; None clears it."""
    store.set_setting(KEY, msgspec.json.encode(served).decode())


def is_alive(served: Served) -> bool:
    """Whether its process runs. On another host: whether it answers."""
    return born(served.pid) == served.born != "" if served.is_here else answers(served.url)


def answers(url: str, timeout_s: float = HEALTH_S) -> bool:
    """Whether a server at `url` says that it is well."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=timeout_s) as reply:
            return bool(reply.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False


def born(pid: int) -> str:
    """When the process began, in this boot of the machine; the same for no other process. Empty: it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{boot}:{fields[19]}"
