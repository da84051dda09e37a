"""What the registry knows of SGLang. No SGLang and no torch here."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from thaw.core.errors import NotFound
from thaw.core.findings import Finding
from thaw.engines.base import Engine
from thaw.engines.keys import api_key as key_for
from thaw.engines.kind import EngineKind, Server, Start, Wanted, called, refuse_options
from thaw.engines.served.client import lookup
from thaw.engines.served.settings import settled
from thaw.engines.sglang import settings

HAS_CUDA = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
LOOK_LIMIT_S = 120.0


class SglangServer(Server):
    title, package = "SGLang", "sglang"
    install = "Install SGLang 0.5.23 (in a clone: make .venv-sglang) and thaw there"
    by_hand = "with --radix-cache-backend thaw"

    def start(self, wanted: Wanted) -> Start:
        own = settings.from_environment()
        own = msgspec.structs.replace(own, stores={**own.stores, **wanted.stores})
        if wanted.arena_nbytes is not None:
            own = msgspec.structs.replace(own, arena_nbytes=wanted.arena_nbytes)
        own = settled(own)
        on_cpu = _says_cpu(wanted.arguments) or not _has_cuda(wanted.python)
        line = settings.server_command(
            wanted.model, wanted.host, wanted.port, python=wanted.python, on_cpu=on_cpu, more=wanted.arguments
        )
        ranks = settings.ranks_in(wanted.arguments)
        environment = {**(settings.cpu_environment(ranks) if on_cpu else {}), **settings.environment(own)}
        return Start(line, mail=own.mail, environment=environment)

    def joined(self, url: str) -> Iterator[Finding]:
        return lookup.joined(url, mail_at, "--radix-cache-backend thaw")

    def started(self, mail: Path, log: str) -> Iterator[Finding]:
        return lookup.active_in(mail, log)


class Sglang(EngineKind):
    name = "sglang"
    server = SglangServer()
    key_variable = settings.KEY_VARIABLE
    packages = ("sglang", "torch")
    advice = (
        "Loading one here needs SGLang 0.5.23 for this device in this environment (make .venv-sglang on a CPU); "
        "one that runs elsewhere is joined without (--radix-cache-backend thaw, --engine URL)."
    )
    software = ("torch", "transformers", "sglang")

    def load(self, **options: Any) -> Engine:
        from thaw.engines.sglang import load

        return called(self.name, load, **options)

    def attach(self, target: Any, *, policy: str = "0", api_key: str | None = None, **options: Any) -> Engine:
        from thaw.engines.sglang import attach

        refuse_options(options)
        return attach(target, policy=policy, api_key=api_key)

    def recognises(self, target: object) -> bool:
        from thaw.engines.sglang import is_engine

        return is_engine(target)

    def serves(self, url: str, api_key: str | None = None) -> bool:
        """It answers on a route of its own."""
        return b"model_path" in lookup.get(lookup.base(url) + "/model_info", key_for(settings.KEY_VARIABLE, api_key))

    def findings(self) -> Iterator[Finding]:
        from thaw.engines.sglang import environment

        return environment.findings()


def mail_at(url: str) -> str:
    """The mail folder of the engine there; "" where thaw is not active. Raises OSError, or ValueError or MsgspecError
    for what is no such server."""
    from thaw.engines.sglang.client import wire

    reply = lookup.post(f"{url}/generate", wire.hello(), key_for(settings.KEY_VARIABLE))
    return wire.facts(msgspec.json.decode(reply, type=wire.StreamEvent)).get("mail", "")


def _says_cpu(arguments: tuple[str, ...]) -> bool:
    """Whether the engine's own arguments ask for the CPU."""
    return "--device=cpu" in arguments or ("--device", "cpu") in itertools.pairwise(arguments)


def _has_cuda(python: str) -> bool:
    try:
        asked = subprocess.run([python, "-c", HAS_CUDA], capture_output=True, timeout=LOOK_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotFound(f"--python {python}: it does not run ({error})") from None
    return asked.returncode == 0


KIND = Sglang()
