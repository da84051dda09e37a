"""What `thaw up` starts: the stock server of a kind of engine that has one, with thaw in it, for this repository."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from thaw.core.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from thaw.engines.kind import Server
    from thaw.store import Store

LOOK_LIMIT_S = 120.0
FINDS = "import importlib.util as u, sys; f = [u.find_spec(n) for n in (sys.argv[1], 'thaw')]; "
FINDS += "sys.exit(sum(2**i for i, s in enumerate(f) if s is None or s.origin is None))"
KEY_OPTIONS = ("--api-key", "--api_key")


class NoServer(InvalidRequest):
    """There is no server of an engine of that name."""


def has_server(name: str) -> bool:
    """Whether the engine of that name is known here, and has a server."""
    from thaw.engines.registry import available, kind_of

    return name in available() and kind_of(name).server is not None


def server_of(name: str) -> Server:
    """Raises `NoServer` for an unknown engine or one without a server, naming those that have one."""
    from thaw.engines.registry import available, kind_of, kinds

    server = kind_of(name).server if name in available() else None
    if server is None:
        known = ", ".join(sorted(kind.name for kind in kinds() if kind.server is not None))
        raise NoServer(f"there is no server for an engine {name!r}; known: {known}")
    return server


def require(server: Server, python: str, model: str, *, named_one: bool) -> None:
    """Whether that Python has the engine, thaw, and what the model needs beside them. Raises `NotFound` saying what to
    do."""
    where = python if named_one else f"this Python ({python})"
    _require_engine(server, python, where)
    for module, advice in server.needs(model).items():
        if _run(python, FINDS, module):
            raise NotFound(f"{where} does not have {module}. {advice}.")


def _require_engine(server: Server, python: str, where: str) -> None:
    missing = _run(python, FINDS, server.package)
    if not missing:
        return
    what = {1: server.title, 2: "thaw", 3: f"neither {server.title} nor thaw"}.get(missing, "something")
    lacks = f"{where} has {what}" if missing == 3 else f"{where} does not have {what}"
    raise NotFound(
        f"{lacks}. {server.install}, then name its Python with --python. Or start a server yourself ({server.by_hand}) "
        "and join it with --engine URL."
    )


def require_keys(arguments: tuple[str, ...]) -> None:
    """Raise `InvalidRequest` for an API key among the server's own arguments that no client could send."""
    from thaw.engines.keys import check_key

    for at, argument in enumerate(arguments):
        option, _, key = argument.partition("=")
        if option in KEY_OPTIONS:
            for one in [key] if "=" in argument else itertools.takewhile(_is_value, arguments[at + 1 :]):
                check_key(one, option)


def with_stored(engine: str, model: str, arguments: tuple[str, ...]) -> tuple[str, ...]:
    """The server's arguments, with what it must be told to load a model whose tensors lie in a store."""
    from thaw.engines.registry import kind_of, stored_options

    told = [f"--{name.replace('_', '-')}={value}" for name, value in stored_options(kind_of(engine), model).items()]
    given = {argument.partition("=")[0] for argument in arguments}
    return (*(one for one in told if one.partition("=")[0] not in given), *arguments)


def _is_value(argument: str) -> bool:
    return not argument.startswith("--")


def _run(python: str, code: str, *arguments: str) -> int:
    """The exit code of a few words of that Python. Raises `NotFound` where it does not run."""
    try:
        return subprocess.run([python, "-c", code, *arguments], capture_output=True, timeout=LOOK_LIMIT_S).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotFound(f"--python {python}: it cannot be run ({error})") from None


def log_of(store: Store) -> Path:
    """Where a server of this repository's writes what it says."""
    return store.path.resolve() / "engine.log"
