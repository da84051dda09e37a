"""The engines of `thaw serve`: the repository's, one or several that run, or workers that are started for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from thaw.cli import boot, options, place, speak
from thaw.cli.progress import Progress
from thaw.core.errors import InvalidRequest

if TYPE_CHECKING:
    from thaw.engines.base import Engine
    from thaw.repo.repository import Repository
    from thaw.repo.settings import EngineSettings

    Reconnect: TypeAlias = Callable[[], Engine]
    Engines: TypeAlias = tuple[Repository, Reconnect, Sequence[tuple[Engine, Reconnect]]]
    """The repository with the first engine, and the others; each with what takes its place when it dies."""

URLS = ("http://", "https://")


class Starting(msgspec.Struct, frozen=True, kw_only=True):
    """How engines are loaded or started, as options say."""

    model: str | None
    dtype: str | None
    device: str | None
    python: str | None
    arena_nbytes: int | None
    environments: tuple[str, ...]
    arguments: tuple[str, ...]


@contextmanager
def opened(named: str | None, names: Sequence[str], workers: int | None, how: Starting) -> Iterator[Engines]:
    """Closes what it opened. Raises `InvalidRequest` for options that do not go together."""
    if workers is not None:
        with _workers(named, names, workers, how) as found:
            yield found
        return
    if how.arena_nbytes is not None or how.environments or how.arguments:
        raise InvalidRequest("--arena, --worker-env and arguments of an engine are for --workers")
    if len(names) > 1 and not all(name.startswith(URLS) for name in names):
        raise InvalidRequest("several --engine must be URLs of servers that run; start several with --workers N")
    first = names[0] if names else None
    with ExitStack() as stack:
        repo = stack.enter_context(speak.opened(named, first, how.model, how.dtype, how.device))
        others: list[tuple[Engine, Reconnect]] = []
        for url in names[1:]:
            others.append((stack.enter_context(boot.boot(boot.choose(None, url, None))), _joining(repo, url, None)))
        yield repo, _joining(repo, first, how.model), others


def _joining(repo: Repository, name: str | None, model: str | None) -> Reconnect:
    """The engine that takes the place of one that died: by the address that was given, or that is remembered by now."""

    def join() -> Engine:
        from thaw.engines import load_engine
        from thaw.repo.choice import choose

        chosen = choose(repo.store, name, model)
        return load_engine(chosen.name, **chosen.options)

    return join


@contextmanager
def _workers(named: str | None, names: Sequence[str], num: int, how: Starting) -> Iterator[Engines]:
    name = names[0] if names else None
    if len(names) > 1 or (name is not None and name.startswith(URLS)):
        raise InvalidRequest("--workers starts its own engines: give --engine a name, once, or leave out --workers")
    environments = [_environment(text) for text in how.environments]
    if len(environments) > num:
        raise InvalidRequest(f"{len(environments)} --worker-env for {num} workers")
    from thaw.repo.repository import open as open_at

    path = place.find(named)
    with ExitStack() as stack:
        look = stack.enter_context(open_at(path, create=False))
        loaded = _in_process(look, name, how)
        if loaded is not None:
            makers = [_loading(loaded)] * num
        else:
            makers = stack.enter_context(_servers(look, name, num, how, environments))
        engines = [stack.enter_context(make()) for make in makers]
        repo = stack.enter_context(open_at(path, engine=engines[0], create=False))
        yield repo, makers[0], list(zip(engines, makers, strict=True))[1:]


def _in_process(look: Repository, name: str | None, how: Starting) -> EngineSettings | None:
    """How to load an engine that has no server; None for one that has."""
    from thaw.repo import settings
    from thaw.serve import has_server

    known = settings.recall(look.store)
    name = name or (known.name if known is not None else None)
    if name is None or has_server(name):
        return None
    if how.arena_nbytes is not None or how.environments or how.arguments:
        raise InvalidRequest(
            f"the engine {name} has no server, so its workers are loaded into this process: --arena, --worker-env and "
            "arguments of an engine are for servers"
        )
    return boot.choose(look.store, name, how.model, how.dtype, how.device)


def _loading(chosen: EngineSettings) -> Reconnect:
    return lambda: boot.boot(chosen)


@contextmanager
def _servers(
    look: Repository, name: str | None, num: int, how: Starting, environments: list[dict[str, str]]
) -> Iterator[list[Reconnect]]:
    from thaw.serve.workers import EngineWorkers

    if how.dtype is not None or how.device is not None:
        raise InvalidRequest("--dtype and --device are the engine's own arguments here: write them after --")
    with (
        options.has_server(),
        EngineWorkers(
            look, num, name, how.model, python=how.python, arena_nbytes=how.arena_nbytes, arguments=how.arguments,
            environments=environments, shown=Progress,
        ) as workers,
    ):  # fmt: skip

        def joining(number: int) -> Reconnect:
            def join() -> Engine:
                from thaw.engines import load_engine

                return load_engine(workers.name, url=workers.again(number))

            return join

        yield [joining(number) for number in range(num)]


def _environment(text: str) -> dict[str, str]:
    pairs = [part.replace("\\,", ",").partition("=") for part in re.split(r"(?<!\\),", text)]
    if not all(name and equals for name, equals, _ in pairs):
        raise InvalidRequest(f"--worker-env {text[:80]!r}: write NAME=VALUE, several with commas between them")
    return {name: value for name, _, value in pairs}
