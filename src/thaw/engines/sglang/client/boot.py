"""From a model's name, or a server that runs already, to a `SglangEngine`.

A booted SGLang is a server of this process's own, on a free port of 127.0.0.1 behind a key that nobody else knows. Its
processes are none of ours: SGLang ends its parent when it fails, and that must not be the user's program.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thaw.core.errors import EngineDied, InvalidRequest, NotFound, TimedOut
from thaw.data.files import read_tail
from thaw.engines.hf.config import check_length, load_config
from thaw.engines.keys import api_key as key_for
from thaw.engines.served.client.attach import join
from thaw.engines.served.client.transport import Transport
from thaw.engines.served.mailbox import Mailbox
from thaw.engines.served.settings import settled
from thaw.engines.sglang.client.engine import SglangEngine
from thaw.engines.sglang.client.http import SglangHttpTransport
from thaw.engines.sglang.settings import (
    ALL_TOKENS,
    BACKEND,
    KEY_VARIABLE,
    ON_CPU,
    SglangSettings,
    command_line,
    cpu_environment,
    environment,
)

BOOT_LIMIT_S = 600.0
FAREWELL_S = 2.0
KEPT_BACK = 6
"""Tokens of the context that SGLang keeps back from a prompt."""
TAIL_NBYTES = 1 << 20


class OwnServer:
    """The server's processes, its address and its key; a log that is looked into when it fails."""

    def __init__(self, model: str, settings: SglangSettings, options: Mapping[str, object]) -> None:
        self._settings = settings
        self._log = tempfile.NamedTemporaryFile(prefix="thaw-sglang-", suffix=".log", delete=False)  # noqa: SIM115
        self.key = secrets.token_hex(16)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        arguments = {
            "model_path": model, "host": "127.0.0.1", "port": port, "api_key": self.key,
            "radix_cache_backend": BACKEND, "skip_server_warmup": True, **options,
        }  # fmt: skip
        on_cpu = arguments.get("device") == "cpu"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "thaw.engines.sglang.serve", *command_line(arguments)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                **(cpu_environment(int(str(arguments.get("tp_size", 1)))) if on_cpu else {}),
                **environment(settings),
                "THAW_PARENT": str(os.getpid()),
                "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
            },
        )

    async def wait(self) -> None:
        """Until it listens. Raises `EngineDied` with the end of its log when it will not."""
        ends = time.monotonic() + BOOT_LIMIT_S
        while not _listens(self.url):
            if self._process.poll() is not None:
                raise EngineDied(f"SGLang did not start: {self.last_words()}")
            if time.monotonic() > ends:
                raise TimedOut(f"SGLang did not start within {BOOT_LIMIT_S:.0f} s: {self.last_words()}")
            await asyncio.sleep(0.1)

    def last_words(self) -> str:
        """What its log says last, with the error if one is there."""
        said = read_tail(Path(self._log.name), TAIL_NBYTES).decode(errors="replace")
        lines = [line for line in said.splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or "Unsupported" in line]
        own = [line for line in errors if line.startswith("thaw.core.errors.")]
        return " | ".join(own[-1:] or (errors or lines)[-3:])[-1500:]

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(FAREWELL_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()
        Path(self._log.name).unlink(missing_ok=True)
        Mailbox(Path(self._settings.mail)).remove()


class OwnServerTransport(SglangHttpTransport):
    """A server that ends with this client."""

    def __init__(self, server: OwnServer) -> None:
        super().__init__(server.url, server.key)
        self._server, self.stays = server, False

    async def connect(self) -> None:
        await self._server.wait()
        await super().connect()

    async def close(self) -> None:
        await super().close()
        await asyncio.to_thread(self._server.end)


def boot(model: str, *, policy: str, settings: SglangSettings, **options: Any) -> SglangEngine:
    """Start a server of this client's own. `options` are SGLang's arguments by their names (page_size, tp_size, …)."""
    from thaw.engines.hf.checkpoint import require_whole

    own = settled(settings)
    overrides = _overrides(options.get("json_model_override_args"))
    require_whole(model, overrides)
    check_length(_config(model, overrides), options.get("max_model_len"))
    given = {**_defaults(options), **_translated(options)}

    async def start() -> Transport:
        return OwnServerTransport(OwnServer(model, own, given))

    return join(SglangEngine, start, policy=policy)


def attach(target: Any, *, policy: str, api_key: str | None = None) -> SglangEngine:
    """Join what runs already with thaw's cache: a server, by its address, or an `sglang.Engine` of this program. It
    stays when this ends."""

    async def to_server() -> Transport:
        return SglangHttpTransport(target, key_for(KEY_VARIABLE, api_key))

    if isinstance(target, str):
        return join(SglangEngine, to_server, policy=policy)
    if api_key is not None:
        raise InvalidRequest("api_key goes with the address of a server")
    from thaw.engines.sglang.client.engine_object import EngineObjectTransport

    transport = EngineObjectTransport(target)

    async def to_engine() -> Transport:
        return transport

    return join(SglangEngine, to_engine, policy=policy)


def _config(model: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """SGLang is told to allow a context beyond the one it derives: it keeps tokens back, and knows no stretched rope
    with its former length. So thaw looks at the length itself."""
    try:
        fields: dict[str, Any] = load_config(model, overrides).get_text_config().to_dict()
    except (OSError, ValueError) as error:
        raise NotFound(f"the config of {model} could not be loaded: {error}") from None
    return fields


def _overrides(given: object) -> dict[str, Any]:
    try:
        fields = json.loads(str(given)) if given is not None else {}
    except ValueError as error:
        raise InvalidRequest(f"json_model_override_args is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("json_model_override_args is no JSON object")
    return fields


def _defaults(options: Mapping[str, object]) -> dict[str, object]:
    import torch

    on_cpu = options.get("device") == "cpu" or not torch.cuda.is_available()
    return {"incremental_streaming_output": True, "log_level": "warning", **ALL_TOKENS, **(ON_CPU if on_cpu else {})}


def _translated(options: Mapping[str, object]) -> dict[str, object]:
    """thaw's common names in SGLang's words."""
    out = dict(options)
    if "max_model_len" in out:
        out["context_length"] = int(str(out.pop("max_model_len"))) + KEPT_BACK
    if "tensor_parallel_size" in out:
        out["tp_size"] = out.pop("tensor_parallel_size")
    taken = {"radix_cache_backend", "host", "port", "api_key", "model_path", "context_length"}
    clash = sorted(options.keys() & taken)
    if clash:
        raise InvalidRequest(f"{', '.join(clash)}: set by thaw itself; leave it out (max_model_len says how long)")
    return out


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(url: str) -> bool:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host, int(port))) == 0
