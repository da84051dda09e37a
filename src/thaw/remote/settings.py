"""Which remotes a repository knows, by name: one JSON setting of its store. Never a credential.

Credentials come from the environment of whoever pushes or fetches, by the usual chain of the store's kind.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from thaw.core import namespaces
from thaw.core.errors import BadPoint, Conflict, CorruptDatabase, InvalidRequest, NotFound
from thaw.core.points import check_name
from thaw.store import Store

KEY = "remotes"
DEFAULT = "origin"
RESERVED = ("HEAD", "detached")
"""Names that mean something of their own in a repository."""
Option: TypeAlias = "str | int | bool"


class RemoteSettings(msgspec.Struct, frozen=True, kw_only=True):
    """A remote's address. `probed`: its conditional writes were seen to hold."""

    url: str
    options: dict[str, Option] = {}
    probed: bool = False


class Upstream(msgspec.Struct, frozen=True, kw_only=True):
    """The remote that a branch is pulled from and pushed to."""

    remote: str
    branch: str


class RemoteBook(msgspec.Struct, frozen=True, kw_only=True):
    """All remotes of a repository by name, the upstreams of its branches (in a namespace as `@NAME/BRANCH`), and
    `promised`: commits of remotes' branches (`origin/main`) that were seen there and are fetched when they are used."""

    remotes: dict[str, RemoteSettings] = {}
    upstreams: dict[str, Upstream] = {}
    promised: dict[str, str] = {}


_DECODER = msgspec.json.Decoder(RemoteBook)


def read(store: Store) -> RemoteBook:
    """Raises `CorruptDatabase`."""
    text = store.get_setting(KEY)
    if text is None:
        return RemoteBook()
    try:
        return _DECODER.decode(text)
    except msgspec.DecodeError as error:
        raise CorruptDatabase(
            f"the setting {KEY!r} of {store.path} is damaged: {error}. Add the remotes again."
        ) from None


def write(store: Store, book: RemoteBook) -> None:
    store.set_setting(KEY, msgspec.json.encode(book, order="sorted").decode())


def check_remote_name(name: str) -> str:
    """`name` if it may name a remote. Raises `InvalidRequest`."""
    try:
        if "/" not in name and name not in RESERVED:
            return check_name(name)
    except BadPoint:
        pass
    raise InvalidRequest(f"{name[:80]!r} cannot name a remote: use letters, digits, '_', '-', '.'.")


def add(store: Store, name: str, remote: RemoteSettings) -> None:
    """Raises `Conflict` where the name is taken, by a remote or by branches and tags `NAME/…`."""
    check_remote_name(name)
    book = read(store)
    if name in book.remotes:
        raise Conflict(
            f"there is a remote {name!r} already, at {book.remotes[name].url}. Remove it first, or use another name."
        )
    taken = [ref.name for ref in store.refs() if ref.name.startswith(f"{name}/")]
    if taken:
        raise Conflict(f"{taken[0]!r} would be mixed up with the branches of a remote {name!r}. Choose another name.")
    write(store, msgspec.structs.replace(book, remotes={**book.remotes, name: remote}))


def remove(store: Store, name: str) -> RemoteSettings:
    """Forgets a remote and the upstreams that name it; nothing at its address changes. Raises `NotFound`."""
    book = read(store)
    gone = get(book, name)
    left = {other: settings for other, settings in book.remotes.items() if other != name}
    upstreams = {branch: up for branch, up in book.upstreams.items() if up.remote != name}
    promised = {point: commit for point, commit in book.promised.items() if not _is_of(point, name)}
    write(store, RemoteBook(remotes=left, upstreams=upstreams, promised=promised))
    return gone


def _is_of(point: str, remote: str) -> bool:
    """Whether a promised point, of whatever namespace, is of this remote."""
    return namespaces.split(point)[1].startswith(f"{remote}/")


def get(book: RemoteBook, name: str) -> RemoteSettings:
    """Raises `NotFound` saying which there are."""
    if name not in book.remotes:
        known = f"; there are: {', '.join(sorted(book.remotes))}" if book.remotes else ""
        raise NotFound(f"there is no remote {name[:80]!r}{known}. Add it with `thaw remote add {name[:80]} URL`.")
    return book.remotes[name]


def set_probed(store: Store, name: str) -> None:
    book = read(store)
    if not get(book, name).probed:
        remote = msgspec.structs.replace(book.remotes[name], probed=True)
        write(store, msgspec.structs.replace(book, remotes={**book.remotes, name: remote}))


def promised(store: Store) -> dict[str, str]:
    """Commits by their points (`origin/main`), of the store's namespace; what was fetched since is left out."""
    mine = {namespaces.split(name): commit for name, commit in read(store).promised.items()}
    return {
        point: commit for (whose, point), commit in mine.items()
        if whose == store.namespace and store.ref(point) is None
    }  # fmt: skip


def promise(store: Store, points: dict[str, str]) -> None:
    book = read(store)
    named = {namespaces.qualify(store.namespace, point): commit for point, commit in points.items()}
    write(store, msgspec.structs.replace(book, promised={**book.promised, **named}))


def upstream(store: Store, branch: str) -> Upstream | None:
    return read(store).upstreams.get(namespaces.qualify(store.namespace, branch))


def set_upstream(store: Store, branch: str, remote: str, theirs: str) -> None:
    book = read(store)
    key, value = namespaces.qualify(store.namespace, branch), Upstream(remote=remote, branch=theirs)
    if book.upstreams.get(key) != value:
        write(store, msgspec.structs.replace(book, upstreams={**book.upstreams, key: value}))


def default_remote(store: Store, branch: str | None = None) -> str:
    """The remote that is meant where none is named: the branch's upstream, else the only one, else `origin`."""
    found = None if branch is None else upstream(store, branch)
    if found is not None:
        return found.remote
    book = read(store)
    return next(iter(book.remotes)) if len(book.remotes) == 1 else DEFAULT
