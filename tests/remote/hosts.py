"""Two hosts and a remote between them, for tests: repositories in folders of their own, and a bucket in a third."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "store"))

from store_sessions import commit, read_all, tokens

from thaw.core.objects import Commit, Segment, SegmentNode, State
from thaw.data.pack import read_blob
from thaw.remote.bucket import Bucket
from thaw.remote.folder import FolderBucket
from thaw.remote.opened import OpenedRemote, over
from thaw.remote.push import PushWish
from thaw.repo import Repository
from thaw.store import Store

__all__ = ["commit", "files", "kv_of", "read_all", "remote", "tokens", "tree", "wish"]


def remote(bucket: Bucket | Path, namespace: str = "", name: str = "origin") -> OpenedRemote:
    opened = FolderBucket(bucket) if isinstance(bucket, Path) else bucket
    return over(name, opened.url, opened, namespace)


def wish(store: Store, branch: str, lease: str | None = "") -> PushWish:
    ref = store.ref(branch)
    assert ref is not None
    return PushWish(ref.kind, branch, ref.target, lease)


def kv_of(store: Store, point: str) -> dict[str, bytes]:
    """Every blob of a commit's state, by id."""
    state = store.get_as(store.get_as(point, Commit).state, State)
    nodes = [store.get_as(node, SegmentNode) for node in state.nodes]
    segments = [store.get_as(entry.segment, Segment) for node in nodes for entry in node.entries]
    blobs = {blob for segment in segments for heads in segment.blobs.values() for blob in heads}
    return {blob: read_blob(store.packs, place) for blob, place in store.locate(blobs).items()}


def files(bucket: Path, part: str) -> list[Path]:
    """The objects of a remote under a folder of it, by name."""
    return sorted(path for path in (bucket / "default" / part).rglob("*") if path.is_file())


def tree(repo: Repository, text: str, children: int) -> None:
    """`main`, which read a text, and `fork/0` … behind it."""
    from thaw import Sampling

    with repo.session(seed=1) as s:
        s.append(text)
        s.commit("read it", branch="main")
        with s.fork(children) as kids:
            kids.generate(["Why?"] * children, Sampling(max_tokens=12, ignore_eos=True))
            for i, kid in enumerate(kids):
                kid.commit(f"child {i}", branch=f"fork/{i}")
