"""What a remote has of history: commits by the keys of their manifests, read from its refs back as far as needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from thaw.core.errors import CorruptBlob
from thaw.core.ids import short
from thaw.remote import manifest as manifests
from thaw.remote.bucket import Bucket
from thaw.remote.manifest import Manifest
from thaw.remote.parallel import SMALL_REQUESTS, mapped
from thaw.remote.refs import RemoteRef


class RemoteHistory:
    """Commits that some ref of the remote reaches, as far as was looked. For one thread."""

    def __init__(self, bucket: Bucket, namespace: str, refs: Iterable[RemoteRef]) -> None:
        self._bucket, self._namespace = bucket, namespace
        self.keys = {ref.commit: ref.manifest for ref in refs if ref.commit is not None and ref.manifest is not None}
        """commit -> key of its manifest"""
        self._read: dict[str, Manifest] = {}

    def manifests(self, commits: Iterable[str]) -> list[Manifest]:
        """Those of commits whose keys are known; their parents' keys are known from then on. Raises `CorruptBlob`."""
        asked = list(commits)
        new = [commit for commit in dict.fromkeys(asked) if commit not in self._read]
        for commit, found in zip(new, mapped(self._fetch, new), strict=True):
            self._read[commit] = found
            for parent in found.parents:
                self.keys.setdefault(parent.commit, parent.manifest)
        return [self._read[commit] for commit in asked]

    def _fetch(self, commit: str) -> Manifest:
        return manifests.read(self._bucket, self.keys[commit], commit, self._namespace)

    def back_to(self, tips: Iterable[str], stop: Callable[[str], bool]) -> list[str]:
        """The commits from `tips` back to those where `stop` is true, these left out: children before parents. All that
        are returned have been read."""
        tips = list(tips)
        self._read_ahead(tips, stop)
        found: dict[str, None] = {}
        waiting = [tip for tip in dict.fromkeys(tips) if not stop(tip)]
        while waiting:
            found.update(dict.fromkeys(waiting))
            parents = [parent.commit for one in self.manifests(waiting) for parent in one.parents]
            waiting = [one for one in dict.fromkeys(parents) if one not in found and not stop(one)]
        return parents_last(found, self._read)

    def _read_ahead(self, tips: Iterable[str], stop: Callable[[str], bool]) -> None:
        """Reads what `back_to` is about to, along trails: in few steps, however long history is."""
        waiting = [tip for tip in dict.fromkeys(tips) if not stop(tip)]
        while waiting:
            before = [one for found in self.manifests(waiting) for one in (*found.parents, *found.trail)]
            for one in before:
                self.keys.setdefault(one.commit, one.manifest)
            fresh = dict.fromkeys(one.commit for one in before)
            waiting = [one for one in fresh if one not in self._read and not stop(one)]

    def look_for(self, wanted: Iterable[str]) -> None:
        """Reads on, from all that is known, until the keys of all of `wanted` are. Raises `CorruptBlob` where one is
        not there, though what descends from it is."""
        missing = self.lacking(wanted)
        if missing:
            raise CorruptBlob(
                f"the manifests of {self._bucket.url} do not lead to commit {short(min(missing))}, though one that "
                "descends from it was pushed. Push to another prefix."
            )

    def lacking(self, wanted: Iterable[str]) -> set[str]:
        """Those of `wanted` that no ref of the remote leads to; the keys of the others are known from then on."""
        missing = {commit for commit in wanted if commit not in self.keys}
        waiting = list(self.keys)
        while missing and waiting:
            parents = [parent.commit for one in self.manifests(waiting) for parent in one.parents]
            missing.difference_update(parents)
            waiting = [one for one in dict.fromkeys(parents) if one not in self._read]
        return missing

    def within(self, tips: Iterable[str], depth: int) -> set[str]:
        """The commits that are less than `depth` steps from one of `tips`. Their keys must be known, or lead there."""
        found: set[str] = set()
        waiting = list(dict.fromkeys(tips))
        for _ in range(depth):
            found.update(waiting)
            parents = [parent.commit for one in self.manifests(waiting) for parent in one.parents]
            waiting = [one for one in dict.fromkeys(parents) if one not in found]
            if not waiting:
                break
        return found


def walk(
    bucket: Bucket, namespace: str, tips: Iterable[tuple[str, str]], workers: int = SMALL_REQUESTS
) -> Iterator[tuple[str, Manifest]]:
    """(key, manifest) of all that `tips` (commit, key) reach, each key once: a commit that was pushed again after a gc
    has several. Raises `CorruptBlob` where one is missing or changed."""
    waiting = {key: commit for commit, key in tips}
    seen: set[str] = set()
    while waiting:
        seen.update(waiting)
        asked = list(waiting.items())
        read = mapped(lambda one: manifests.read(bucket, one[0], one[1], namespace), asked, workers)
        waiting = {}
        for (key, _), found in zip(asked, read, strict=True):
            yield key, found
            before = (*found.parents, *found.trail)
            waiting.update({one.manifest: one.commit for one in before if one.manifest not in seen})


def parents_last(found: Iterable[str], read: dict[str, Manifest]) -> list[str]:
    """`found` so that no commit comes after one of its parents."""
    tips = list(found)
    inside, order, seen = set(tips), list[str](), set[str]()
    for tip in tips:
        waiting = [(tip, False)]
        while waiting:
            at, done = waiting.pop()
            if done:
                order.append(at)
            elif at not in seen and at in inside:
                seen.add(at)
                waiting.append((at, True))
                waiting += [(parent.commit, False) for parent in read[at].parents]
    return order[::-1]
