"""The registry of engines: entry points of group `thaw.engines`, each the name of an `EngineKind`.

Naming an engine costs nothing until it is used: a kind imports its engine when it loads one. Another distribution adds
an engine by declaring an entry point; two that claim one name are an error. An entry point may also name a function
`load(**options) -> Engine` alone: that engine can be loaded, and joined where its module has an `attach`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thaw.core.errors import InvalidRequest, NotFound
from thaw.engines.kind import EngineKind, called

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from importlib.metadata import EntryPoint

    from thaw.engines.base import Engine

GROUP = "thaw.engines"
DEFAULT = "transformers"
"""The engine that a verb loads where none was named."""
DEFAULT_SERVER = "vllm"
"""What `thaw up` starts, and what a server that no kind recognises is taken for: its client says what is wrong."""
OWN = {
    "fake": "thaw.engines.fake.kind:KIND",
    "transformers": "thaw.engines.transformers.kind:KIND",
    "vllm": "thaw.engines.vllm.kind:KIND",
    "sglang": "thaw.engines.sglang.kind:KIND",
}


def stored_options(kind: EngineKind, model: object) -> Mapping[str, str]:
    """Options for an engine that loads `model`, where its tensors lie in a store (`thaw.engines.hf.stored`)."""
    from thaw.engines.hf.stored import is_stored

    return kind.stored if kind.stored and isinstance(model, str) and is_stored(Path(model)) else {}


def available() -> dict[str, EntryPoint]:
    """Engines by name: thaw's own, those of this very source tree whatever is installed, then those of others."""
    from importlib.metadata import EntryPoint, entry_points  # 50 ms that naming an engine need not cost

    found = {name: EntryPoint(name, value, GROUP) for name, value in OWN.items()}
    for point in entry_points(group=GROUP):
        if point.value.startswith("thaw.engines."):
            continue
        known = found.get(point.name)
        if known is not None and known.value != point.value:
            raise InvalidRequest(
                f"two packages provide an engine named {point.name!r}: {known.value} and {point.value}"
            )
        found[point.name] = point
    return found


def kind_of(name: str) -> EngineKind:
    """The kind of that name. Raises `NotFound` where there is none, or its package cannot be imported."""
    engines = available()
    if name not in engines:
        raise NotFound(f"no engine named {name!r}; installed: {', '.join(sorted(engines))}")
    return made(engines[name])


def made(point: EntryPoint) -> EngineKind:
    """What the entry point names. Raises `NotFound` where that cannot be imported, or is something else."""
    try:
        named = point.load()
    except (ImportError, AttributeError) as error:
        raise NotFound(f"engine {point.name} ({point.value}) cannot be imported: {error}") from error
    if isinstance(named, EngineKind) and named.name == point.name:
        return named
    if isinstance(named, EngineKind) or not callable(named):
        said = f"the kind of engine {named.name!r}" if isinstance(named, EngineKind) else f"a {type(named).__name__}"
        raise NotFound(f"engine {point.name}: {point.value} is {said}; an EngineKind of that name belongs there")
    return _Loader(point, named)


def kinds() -> Iterator[EngineKind]:
    """Those of others first, which know best how they differ from thaw's own. One that cannot be imported costs the
    others nothing: it is warned of and left out."""
    found = available()
    for name in sorted(found, key=lambda name: (name in OWN, list(found).index(name))):
        try:
            yield made(found[name])
        except NotFound as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)


def load_engine(name: str, **options: object) -> Engine:
    """Boot the engine `name`. Options are the engine's own (for transformers: model, dtype, device, …).

    With `url` the one that runs there is joined instead, where that kind of engine has a server."""
    kind = kind_of(name)
    given: dict[str, Any] = dict(options)
    if "url" in given:
        engine = called(name, kind.attach, given.pop("url"), **given)
    else:
        engine = called(name, kind.load, **{**stored_options(kind, given.get("model")), **given})
    options.pop("api_key", None)  # never kept where the repository remembers its engine
    engine.options = {key: value for key, value in options.items() if _is_kept(value)}
    return engine


def _is_kept(value: object) -> bool:
    """Whether an option is a plain value, or plain texts by name (`adapters`)."""
    if isinstance(value, Mapping):
        return all(isinstance(one, str) for one in (*value.keys(), *value.values()))
    return isinstance(value, (str, int, float, bool))


def engine_at(url: str, api_key: str | None = None) -> str:
    """Which engine serves this address (of several with commas between them: the first)."""
    first = url.split(",", 1)[0]
    return next((kind.name for kind in kinds() if kind.serves(first, api_key)), DEFAULT_SERVER)


class _Loader(EngineKind):
    """An entry point that names a function."""

    needs_model = False

    def __init__(self, point: EntryPoint, load: Callable[..., Engine]) -> None:
        self.name = point.name  # type: ignore[misc] # one object for each such entry point
        self._load, self._module = load, point.module

    def load(self, **options: Any) -> Engine:
        return called(self.name, self._load, **options)

    def attach(self, target: Any, *, policy: str = "0", api_key: str | None = None, **options: Any) -> Engine:
        join: Callable[..., Engine] | None = getattr(import_module(self._module), "attach", None)
        if join is None:
            return super().attach(target, policy=policy, api_key=api_key, **options)
        return called(self.name, join, target, policy=policy, api_key=api_key, **options)
