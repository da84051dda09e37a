"""The tags that keep a thread's points from gc: `langgraph/<thread>/<digits of the commit>`.

A tag exists before a checkpoint that names its commit is stored, and until after the last of the thread's is gone. A
process that is killed between the two leaves a tag too many, never one too few; the next saver that opens the
repository drops it. All of it happens inside `CheckpointFile.writing()`, so that no saver drops what another one is
about to name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from thaw.core.errors import NotFound
from thaw.core.ids import CommitId, digest, short
from thaw.integrations.langgraph.checkpoints import CheckpointFile
from thaw.store import Ref, RefUpdate, Store

PREFIX = "langgraph"
_PLAIN = re.compile(r"(?!x-)[A-Za-z0-9_-]{1,80}\Z")
DIGITS = 40
"""Of a commit's id in a tag's name; the tag's target is the whole of it."""


def tag_of(thread: str, point: str) -> str:
    """A thread whose id can be part of a ref's name is called so, any other by a hash."""
    name = thread if _PLAIN.match(thread) else f"x-{short(digest(thread.encode()), 32)}"
    return f"{PREFIX}/{name}/{short(point, DIGITS)}"


def stored(store: Store, points: Iterable[str]) -> set[str]:
    """Those that are commits of this repository and namespace; others are somebody else's to keep, or no points."""
    return {point for point in points if _is_commit(store, point)}


def _is_commit(store: Store, point: str) -> bool:
    return point in store.find(point)


def hold(store: Store, thread: str, points: Iterable[str]) -> set[str]:
    """Keep the points for the thread; on disk on return. Gives those that are kept: gc may have been faster."""
    wanted = stored(store, points)
    while True:
        missing = [point for point in sorted(wanted) if store.ref(tag_of(thread, point)) is None]
        try:
            store.update_refs(*(_update(thread, point, "kept for a checkpoint", point) for point in missing))
        except NotFound:
            wanted = stored(store, wanted)
            continue
        return wanted


def release(store: Store, thread: str, points: Iterable[str]) -> None:
    """No checkpoint of the thread names these any more. gc frees what nothing else needs."""
    names = [point for point in sorted(points) if store.ref(tag_of(thread, point)) is not None]
    if names:
        store.update_refs(*(_update(thread, point, "no checkpoint names it", None) for point in names))


def reconcile(store: Store, file: CheckpointFile) -> tuple[int, int]:
    """Make the tags those that the checkpoints ask for: (tags made, tags dropped). Others' tags are left alone."""
    with file.writing():
        wanted: dict[str, tuple[str, str]] = {tag_of(*pair): pair for pair in file.all_points()}
        there = {ref.name for ref in store.refs("tag") if _is_own(ref)}
        lost = [pair for name, pair in wanted.items() if name not in there and _is_commit(store, pair[1])]
        for thread, point in lost:
            hold(store, thread, [point])
        left = sorted(there - wanted.keys())
        if left:
            reason = "langgraph: left behind"
            store.update_refs(
                *(RefUpdate(name=name, kind="tag", target=None, expect="any", reason=reason) for name in left)
            )
        return len(lost), len(left)


def _is_own(ref: Ref) -> bool:
    """Whether it is called as `tag_of` calls the tags of its commit: `langgraph/best` is somebody else's."""
    prefix, _, rest = ref.name.partition("/")
    return prefix == PREFIX and rest.partition("/")[2] == short(ref.target, DIGITS)


def _update(thread: str, point: str, why: str, target: str | None) -> RefUpdate:
    to = None if target is None else CommitId(target)
    return RefUpdate(name=tag_of(thread, point), kind="tag", target=to, expect="any", reason=f"langgraph: {why}")
