"""What `thaw up` starts: the stock server of each engine that has one, with thaw in it, which knows this repository."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from thaw.core.errors import NotFound
from thaw.store import Store

LOOK_LIMIT_S = 120.0
FINDS = "import importlib.util as u, sys; f = [u.find_spec(n) for n in (sys.argv[1], 'thaw')]; "
FINDS += "sys.exit(sum(2**i for i, s in enumerate(f) if s is None or s.origin is None))"
KEY_OPTIONS = ("--api-key", "--api_key")
HAS_CUDA = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"


@dataclass(frozen=True)
class Wanted:
    """What the command line says. `arguments` are the engine's own, and go before thaw's."""

    store: Store
    python: str
    model: str
    host: str
    port: int
    arena: int | None
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Start:
    """`config`: the file that the server reads, empty where it reads none. `environment`: what it is told there."""

    command: list[str]
    mail: str
    config: str = ""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """An engine that has a server. `releases`: those that thaw runs on; `by_hand`: how one is started without this."""

    title: str
    package: str
    releases: str
    by_hand: str
    start: Callable[[Wanted], Start]


def require(kind: Kind, python: str, *, named_one: bool) -> None:
    """Whether that Python has the engine and thaw. Raises `NotFound` saying what to do."""
    missing = _run(python, FINDS, kind.package)
    if not missing:
        return
    what = {1: kind.title, 2: "thaw", 3: f"neither {kind.title} nor thaw"}.get(missing, "something")
    where = python if named_one else f"this Python ({python})"
    lacks = f"{where} has {what}" if missing == 3 else f"{where} does not have {what}"
    raise NotFound(
        f"{lacks}. Install {kind.title} {kind.releases} (in a clone: make .venv-{kind.package}) and thaw there, and "
        f"name its Python with --python; or start a server yourself ({kind.by_hand}) and join it with --engine URL."
    )


def require_keys(arguments: tuple[str, ...]) -> None:
    """Raise `InvalidRequest` for an API key among the server's own arguments that no client could send."""
    from thaw.engines.keys import check_key

    for at, argument in enumerate(arguments):
        option, _, key = argument.partition("=")
        if option in KEY_OPTIONS:
            for one in [key] if "=" in argument else itertools.takewhile(_is_value, arguments[at + 1 :]):
                check_key(one, option)


def _is_value(argument: str) -> bool:
    return not argument.startswith("--")


def _vllm(wanted: Wanted) -> Start:
    from thaw.data.files import write_atomic
    from thaw.engines.vllm import settings

    own = settings.VllmSettings(stores=_stores(wanted.store))
    if wanted.arena is not None:
        own = msgspec.structs.replace(own, arena_nbytes=wanted.arena)
    own = settings.settled(own)
    config = wanted.store.path.resolve() / "engine.yaml"
    write_atomic(config, settings.config_file(own).encode())
    line = settings.server_command(wanted.model, config, wanted.port, python=wanted.python)
    return Start([*line, "--host", wanted.host, *wanted.arguments], mail=own.mail, config=str(config))


def _sglang(wanted: Wanted) -> Start:
    from thaw.engines.sglang import settings

    own = settings.from_environment()
    own = msgspec.structs.replace(own, stores={**own.stores, **_stores(wanted.store)})
    if wanted.arena is not None:
        own = msgspec.structs.replace(own, arena_nbytes=wanted.arena)
    own = settings.settled(own)
    on_cpu = _says_cpu(wanted.arguments) or _run(wanted.python, HAS_CUDA) != 0
    line = settings.server_command(
        wanted.model, wanted.host, wanted.port, python=wanted.python, on_cpu=on_cpu, more=wanted.arguments
    )
    ranks = settings.ranks_in(wanted.arguments)
    environment = {**(settings.cpu_environment(ranks) if on_cpu else {}), **settings.environment(own)}
    return Start(line, mail=own.mail, environment=environment)


KINDS = {
    "vllm": Kind("vLLM", "vllm", "0.26 to 0.32", "thaw engine config vllm", _vllm),
    "sglang": Kind("SGLang", "sglang", "0.5.23", "with --radix-cache-backend thaw", _sglang),
}


def _stores(store: Store) -> dict[str, str]:
    """This repository is known to the engine from its start."""
    return {store.uuid: str(store.packs.resolve())}


def _says_cpu(arguments: tuple[str, ...]) -> bool:
    """Whether the engine's own arguments ask for the CPU."""
    return "--device=cpu" in arguments or ("--device", "cpu") in itertools.pairwise(arguments)


def _run(python: str, code: str, *arguments: str) -> int:
    """The exit code of a few words of that Python. Raises `NotFound` where it does not run."""
    try:
        return subprocess.run([python, "-c", code, *arguments], capture_output=True, timeout=LOOK_LIMIT_S).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotFound(f"--python {python}: it does not run ({error})") from None


def log_of(store: Store) -> Path:
    """Where a server of this repository's writes what it says."""
    return store.path.resolve() / "engine.log"
