"""Running the gateway: uvicorn, one process, one event loop. SIGTERM lets what runs be committed before it ends."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from logging.handlers import WatchedFileHandler

import uvicorn

from thaw.core.errors import ThawError
from thaw.engines.base import Engine
from thaw.gateway.app import application, audit
from thaw.gateway.connection import Guards
from thaw.gateway.engines import Reconnect
from thaw.gateway.ledger import Ledger
from thaw.gateway.service import Service
from thaw.gateway.settings import GatewaySettings
from thaw.gateway.tenants import Tenants
from thaw.repo.repository import Repository
from thaw.store.locks import locked

LOCK = "gateway.lock"
DRAIN_S = 60
SWITCH_S = 0.001
"""After which a thread that computes in Python lets the event loop go on. Python's own 5 ms would be added to each step
of a request, while an engine or a commit in this process computes."""
ARENAS = 2
"""Of the C library's memory. By default a hundred threads have many, and what is freed in one is not used in another.
Threads of Python seldom allocate at the same time."""
M_ARENA_MAX = -8
"""As in glibc's malloc.h."""


@contextlib.contextmanager
def opened(
    repo: Repository,
    tenants: Tenants,
    settings: GatewaySettings,
    reconnect: Reconnect | None = None,
    others: Sequence[tuple[Engine, Reconnect | None]] = (),
) -> Iterator[Service]:
    """The service of a repository, which has one gateway at a time. `others`: see `Service`. Raises `Busy`,
    `InvalidRequest`, `StorageFailed`."""
    busy = f"another gateway is serving {repo.path}; stop it first"
    with locked(repo.path / LOCK, wait_s=0.0, busy=busy):
        ledger = Ledger(repo.path)
        try:
            ledger.interrupt()
            yield Service(repo, tenants, settings, ledger, reconnect, others)
        finally:
            ledger.close()


class GatewayServer(uvicorn.Server):
    """Ends what runs before it waits for connections, so that open streams get their last event."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self.failed: ThawError | None = None
        """Why it did not start."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await self._service.readers.start()
        except ThawError as error:
            self.failed, self.should_exit = error, True
            return
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._service.close()
        await super().shutdown(sockets)


def server(service: Service) -> GatewayServer:
    """Not yet running."""
    settings = service.settings
    config = uvicorn.Config(
        application(service),
        http=Guards(settings.limits).connect,  # type: ignore[arg-type]
        ws="none",
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=DRAIN_S,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.certificate_key,
    )
    return GatewayServer(config, service)


def run(service: Service) -> None:
    """Serve until SIGTERM or SIGINT; when all that ran is committed, leave by `SystemExit`, so that everything closes.
    For the main thread. Raises `InvalidRequest` where the parsers that the settings name do not run."""
    sys.setswitchinterval(SWITCH_S)
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, lambda *_: sys.exit(0))  # uvicorn has its own meanwhile, and raises it again at its end
    made = server(service)
    gc.collect()
    gc.freeze()  # what is there from the start is not looked through again each time
    made.run()
    if made.failed is not None:
        raise made.failed


def share_memory() -> None:
    """Let this process's threads share `ARENAS` arenas, where the C library has such; before an engine starts any."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)


def keep_audit(path: str | None) -> None:
    """Lines of the audit log go to a file, 0600, which may be rotated."""
    audit.propagate = False
    if path is None:
        audit.addHandler(logging.NullHandler())
        return
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600))
    handler = WatchedFileHandler(path)
    handler.setFormatter(logging.Formatter("%(message)s"))
    audit.addHandler(handler)
    audit.setLevel(logging.INFO)
