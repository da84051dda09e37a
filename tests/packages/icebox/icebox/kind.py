"""What thaw knows of icebox: all that an entry point may carry."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from icebox import Icebox, make
from thaw.core.findings import Finding
from thaw.engines.base import Engine
from thaw.engines.kind import ConfigFile, EngineKind, Server, Settings, Start, Wanted, refuse_options

LIMIT_S = 5.0


class IceboxServer(Server):
    title, package = "Icebox", "icebox"
    install = "Install icebox and thaw there"
    by_hand = "python -m icebox.serve"
    log_prefix = r"^\[icebox\] "
    config_suffixes = (".json",)

    def start(self, wanted: Wanted) -> Start:
        config = wanted.folder / "icebox.json"
        config.write_text(json.dumps({"stores": dict(wanted.stores)}))
        line = [wanted.python, "-m", "icebox.serve", wanted.model, str(wanted.port), str(config), *wanted.arguments]
        return Start(line, config=str(config), environment={"ICEBOX_HOST": wanted.host})

    def config_file(self, told: Settings) -> ConfigFile:
        return ConfigFile(json.dumps({"stores": dict(told.stores)}), mail="")

    def config_commands(self, config: Path) -> list[tuple[list[str], str]]:
        return [(["python", "-m", "icebox.serve", "MODEL", "PORT", str(config)], "")]

    def joined(self, url: str) -> Iterator[Finding]:
        there = said(url)
        if there is None:
            yield Finding(name="server", status="warning", text=f"nobody keeps ice at {url}")
        else:
            yield Finding(name="server", status="ok", text=f"icebox at {url} keeps {there['sessions']} sessions")

    def started(self, mail: Path, log: str) -> Iterator[Finding]:
        yield Finding(name="connector", status="ok", text=f"icebox writes to {log}")


class IceboxKind(EngineKind):
    name = "icebox"
    server = IceboxServer()
    key_variable = "ICEBOX_KEY"
    packages = ("icebox",)

    def load(self, *, model: str, policy: str = "0") -> Engine:
        return make(model, policy)

    def attach(self, target: Any, *, policy: str = "0", api_key: str | None = None, **options: Any) -> Engine:
        from icebox.client import HttpEngine

        refuse_options(options)
        return HttpEngine(target, policy) if isinstance(target, str) else target.engine

    def recognises(self, target: object) -> bool:
        return isinstance(target, Icebox)

    def serves(self, url: str, api_key: str | None = None) -> bool:
        return said(url) is not None

    def findings(self) -> Iterator[Finding]:
        yield Finding(name="icebox-room", status="ok", text="there is room for ice")


def said(url: str) -> dict[str, Any] | None:
    """What the server there says of itself; None where none of ours answers."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/icebox", timeout=LIMIT_S) as reply:
            found: dict[str, Any] = json.loads(reply.read())
    except (OSError, ValueError):
        return None
    return found if "sessions" in found else None


KIND = IceboxKind()
