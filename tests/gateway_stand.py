"""A gateway on a real port, over an engine of the test's, and the stock clients of both APIs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import thaw
from thaw.engines.base import Engine

for package in ("starlette", "uvicorn"):
    pytest.importorskip(package, reason="the extra [server] is not installed")

from thaw.gateway import server as running  # noqa: E402
from thaw.gateway.service import Service  # noqa: E402
from thaw.gateway.settings import GatewaySettings  # noqa: E402
from thaw.gateway.tenants import Tenants  # noqa: E402

TOKEN = "test-token"


class Gateway:
    """One that runs on a thread. `engine` counts what it computes."""

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        tenants: Tenants,
        settings: GatewaySettings,
        reconnect: Callable[[], Engine] | None = None,
        others: Sequence[tuple[Engine, Callable[[], Engine] | None]] = (),
    ) -> None:
        self.folder, self.engine = folder, engine
        self.engines = [engine, *(one for one, _ in others)]
        self._stack = ExitStack()
        self.repo = self._stack.enter_context(thaw.open(folder, engine=engine))
        self.service: Service = self._stack.enter_context(
            running.opened(self.repo, tenants, settings, reconnect, others)
        )
        self.server = running.server(self.service)
        self.socket = socket.socket(proto=socket.IPPROTO_TCP)
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self._thread.start()
        while not self.server.started:
            time.sleep(0.005)

    @property
    def num_forwarded(self) -> int:
        """Tokens that all engines have run through their model."""
        return sum(self.forwarded_each)

    @property
    def forwarded_each(self) -> list[int]:
        return [int(one._backend.num_forwarded_tokens) for one in self.engines]  # type: ignore[attr-defined]

    def num_open(self, most: int) -> int:
        """Sessions open in all engines, soon `most`: a client is answered before what is too much is closed."""
        until = time.monotonic() + 20
        while True:
            found = sum(len(one._sessions) for one in self.engines)  # type: ignore[attr-defined]
            if found <= most or time.monotonic() > until:
                return found
            time.sleep(0.01)

    def openai(self, token: str = TOKEN) -> Any:
        openai = pytest.importorskip("openai")
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0)

    def anthropic(self, token: str = TOKEN) -> Any:
        anthropic = pytest.importorskip("anthropic")
        return anthropic.Anthropic(base_url=self.url, api_key=token, max_retries=0)

    def close(self) -> None:
        self.server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._stack.close()
        self.socket.close()


Start = Callable[..., Gateway]
