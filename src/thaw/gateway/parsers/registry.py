"""Which engines have parsers, and where.

Engines are those that `thaw.engines.registry` knows. One of another distribution has parsers where an entry point of
group `thaw.parsers` has its name; thaw's own have them in a module of this folder with the engine's name. The module is
imported in that engine's Python alone, and its `PARSERS` makes them (`EngineParsers` in `child`).
"""

from __future__ import annotations

from importlib.util import find_spec

from thaw.engines.registry import available

GROUP = "thaw.parsers"
_OWN = "thaw.engines."
"""What the modules of thaw's own kinds of engine begin with."""


def modules() -> dict[str, str]:
    """The module with an engine's parsers, by the engine's name, in the registry's order. Imports none of them."""
    from importlib.metadata import entry_points  # 50 ms that a gateway without such parsers need not cost

    theirs = {point.name: point.module for point in entry_points(group=GROUP)}
    own = {name: f"{__package__}.{name}" for name, kind in available().items() if kind.value.startswith(_OWN)}
    found = {name: module for name, module in own.items() if find_spec(module) is not None}
    return found | {name: theirs[name] for name in available() if name in theirs and name not in own}
