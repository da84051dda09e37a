"""The registry of engines: entry points of group `thaw.engines`, each `name = "module:load"`.

`load(**options) -> Engine` imports what it needs itself, so that naming an engine costs nothing until it is used.
Another distribution adds an engine by declaring an entry point; two that claim one name are an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thaw.core.errors import InvalidRequest, NotFound, Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.metadata import EntryPoint

    from thaw.engines.base import Engine

GROUP = "thaw.engines"
_OWN = {
    "fake": "thaw.engines.fake:load",
    "transformers": "thaw.engines.transformers:load",
    "vllm": "thaw.engines.vllm:load",
    "sglang": "thaw.engines.sglang:load",
}


def available() -> dict[str, EntryPoint]:
    """Engines by name: thaw's own (also from a source tree) and those of other distributions."""
    from importlib.metadata import EntryPoint, entry_points  # 50 ms that naming an engine need not cost

    found = {name: EntryPoint(name, value, GROUP) for name, value in _OWN.items()}
    for point in entry_points(group=GROUP):
        known = found.get(point.name)
        if known is not None and known.value != point.value:
            raise InvalidRequest(
                f"two packages provide an engine named {point.name!r}: {known.value} and {point.value}"
            )
        found[point.name] = point
    return found


def load_engine(name: str, **options: object) -> Engine:
    """Boot the engine `name`. Options are the engine's own (for transformers: model, dtype, device, …).

    With `url` the one that runs there is joined instead, where the engine's module has an `attach`."""
    engines = available()
    if name not in engines:
        raise NotFound(f"no engine named {name!r}; installed: {', '.join(sorted(engines))}")
    make = engines[name].load() if "url" not in options else _joining(name, engines[name])
    _require_options(name, make, options)
    engine: Engine = make(**options)
    options.pop("api_key", None)  # never kept where the repository remembers its engine
    engine.options = {key: value for key, value in options.items() if isinstance(value, (str, int, float, bool))}
    return engine


def _require_options(name: str, make: Callable[..., Engine], options: dict[str, object]) -> None:
    """Raise `InvalidRequest` for an option that the engine has not, or for one that is missing."""
    import inspect

    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise InvalidRequest(f"engine {name}: {error}") from None


def _joining(name: str, point: EntryPoint) -> Callable[..., Engine]:
    from importlib import import_module

    attach: Callable[..., Engine] | None = getattr(import_module(point.module), "attach", None)
    if attach is None:
        raise Unsupported(f"engine {name} is loaded into this process; it has no server to join by a URL")
    return lambda *, url, **rest: attach(url, **rest)
