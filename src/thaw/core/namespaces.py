"""Namespaces: several tenants in one repository, none of whom can reach another's sessions.

Refs, HEAD, reflogs and commits belong to one namespace each. The *default* one has no name, and is what a repository
without namespaces consists of. In the tables of a store the ref `main` of the namespace `acme` is called `@acme/main`,
which no point can spell; `Ref`, `ReflogEntry` and messages say `main`.
"""

from __future__ import annotations

from thaw.core.errors import BadPoint, InvalidRequest
from thaw.core.points import check_name

DEFAULT = ""
MAX_NAME = 100
_MARK = "@"


def check(name: str) -> str:
    """`name` if it may name a namespace, else `InvalidRequest`. "" is refused: a name that was lost on the way does not
    lead to the default one."""
    try:
        if isinstance(name, str) and len(name) <= MAX_NAME and "/" not in name:
            return check_name(name)
    except BadPoint:
        pass
    raise InvalidRequest(
        f"{str(name)[:80]!r} cannot name a namespace: use letters, digits, '_', '-', '.' (at most {MAX_NAME}, no '..')."
    )


def qualify(namespace: str, name: str) -> str:
    """What a ref of a namespace is called in the tables. Raises `BadPoint` where `name` cannot name a ref."""
    check_name(name)
    return f"{_MARK}{namespace}/{name}" if namespace else name


def split(qualified: str) -> tuple[str, str]:
    """(namespace, name) of what `qualify` made. One namespace is never a part of another's name."""
    if not qualified.startswith(_MARK):
        return DEFAULT, qualified
    namespace, _, name = qualified[len(_MARK) :].partition("/")
    return namespace, name


def bounds(namespace: str) -> tuple[str, str]:
    """From and to which text the refs of a namespace that is not the default one are called."""
    return f"{_MARK}{namespace}/", f"{_MARK}{namespace}{chr(ord('/') + 1)}"


def check_qualified(name: str) -> str:
    """`name` if `qualify` could have made it. Raises `BadPoint`, `InvalidRequest`."""
    namespace, bare = split(name)
    if name.startswith(_MARK):
        check(namespace)
    check_name(bare)
    return name
