"""Pushes, fetches, deletes and gc at the same time, in every order that is drawn: no ref names what is not there."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hosts import commit, read_all, remote, tokens, wish
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steps import SteppedBucket, Turns, no_fault

from thaw.core.errors import Busy, Conflict, NotFound, RefConflict, RemoteUncertain, RemoteUnreachable
from thaw.remote import refs
from thaw.remote.fetch import FetchWish, fetch
from thaw.remote.folder import FolderBucket
from thaw.remote.forget import forget
from thaw.remote.gc import GcWish, collect
from thaw.remote.layout import NamespaceBucket
from thaw.remote.push import PushWish, Tuning, push
from thaw.store import Store

IN_ORDER = Tuning(pack_bytes=1 << 14, uploads=1, workers=1)
AT_ONCE = GcWish(grace_s=0.0, keep_reflog_s=0.0, workers=1)
BRANCHES = ("main", "side")
LOST = (RefConflict, Conflict, NotFound, Busy, RemoteUnreachable, RemoteUncertain)
"""What an actor may be told, when others were first or an answer was lost."""


@contextmanager
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        yield path
    finally:
        shutil.rmtree(path)


class Writer:
    """A host that commits on branches of its own, from where the remote's were last seen, and pushes."""

    def __init__(self, path: Path, number: int, bucket: SteppedBucket) -> None:
        self.store, self.number = Store.init(path), number
        self.remote = remote(bucket)
        self.made = 0
        self.pushed: list[str] = []

    def push(self, branch: str) -> None:
        self.made += 1
        base = self.store.ref(f"origin/{branch}")
        parents = () if base is None else (base.target,)
        made = commit(
            self.store, tokens(40 + 300 * self.number, 100 * self.number + self.made), branch=branch, parents=parents
        )
        push(self.store, self.remote, [wish(self.store, branch)], tuning=IN_ORDER)
        self.pushed.append(made)

    def again(self, branch: str) -> None:
        """Pushes what it has of the branch once more: after a delete it builds on what gc may have taken."""
        if self.store.ref(branch) is not None:
            push(self.store, self.remote, [wish(self.store, branch)], tuning=IN_ORDER)

    def delete(self, branch: str) -> None:
        push(self.store, self.remote, [PushWish("branch", branch, None)], tuning=IN_ORDER)

    def fetch(self, branch: str) -> None:
        fetch(self.store, self.remote, workers=1)

    def shallow(self, branch: str) -> None:
        fetch(self.store, self.remote, FetchWish(depth=1), workers=1)

    def deepen(self, branch: str) -> None:
        fetch(self.store, self.remote, FetchWish(unshallow=True), workers=1)

    def gc(self, branch: str) -> None:
        collect(self.remote, AT_ONCE)

    def forget(self, branch: str) -> None:
        forget(self.remote, [("branch", branch)], workers=1)


def check_whole(bucket: Path, path: Path) -> dict[str, str]:
    """Every branch of the remote can be fetched with all its history, and reads; returns where they stand."""
    store = Store.init(path)
    fetch(store, remote(bucket), workers=1)
    for one in store.commits():
        read_all(store, one)
    found = {ref.name: ref.target for ref in store.refs()}
    store.close()
    return found


class Priorities:
    """Who goes next: always the first of those that may, and now and then that one becomes the last. So an actor also
    stands still while another does all its work, which few orders do that are drawn step by step."""

    def __init__(self, chance: random.Random) -> None:
        self._chance, self._order = chance, list[str]()

    def __call__(self, ready: list[str]) -> str:
        for name in ready:
            if name not in self._order:
                self._order.insert(self._chance.randint(0, len(self._order)), name)
        first = next(name for name in self._order if name in ready)
        if self._chance.random() < 0.08:
            self._order.remove(first)
            self._order.append(first)
        return first


Script = list[tuple[str, str]]
VERBS = st.sampled_from(("push", "push", "again", "delete", "fetch", "gc", "gc", "forget", "shallow", "deepen"))
SCRIPTS = st.lists(
    st.lists(st.tuples(VERBS, st.sampled_from(BRANCHES)), min_size=1, max_size=4), min_size=2, max_size=3
)


def play(base: Path, scripts: list[Script], seed: int, faults: float) -> SteppedBucket:
    """Runs each script as an actor, in an order that the seed draws."""
    chance, turns = random.Random(seed), Turns()
    lost: Callable[[str, str], str] = no_fault
    if faults:
        lost = lambda request, key: chance.choice(("before", "after")) if chance.random() < faults else ""  # noqa: E731
    bucket = SteppedBucket(FolderBucket(base / "bucket"), turns, lost)
    writers = [Writer(base / f"host{i}", i, bucket) for i in range(len(scripts))]

    def act(writer: Writer, script: Script) -> None:
        for verb, branch in script:
            try:
                getattr(writer, verb)(branch)
            except LOST:
                continue

    turns.run(
        {f"host{i}": lambda w=w, s=s: act(w, s) for i, (w, s) in enumerate(zip(writers, scripts, strict=True))},  # type: ignore[misc]
        Priorities(chance),
    )
    swapped = [refs.decode(data, *_named(key)) for key, data in bucket.swaps if "/refs/" in key]
    for writer in writers:
        assert all(any(ref.commit == one for ref in swapped) for one in writer.pushed), (
            "a push that returned moved no ref"
        )
        assert writer.store.fsck().ok
        writer.store.close()
    return bucket


def _named(key: str) -> tuple[refs.Kind, str]:
    kind, name = key.split("/")[-2:]
    return ("tag" if kind == "tag" else "branch"), name


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(scripts=SCRIPTS, seed=st.integers(0, 1 << 30), faults=st.sampled_from((0.0, 0.0, 0.03)))
def test_no_order_of_pushes_deletes_fetches_and_gc_leaves_a_ref_without_its_data(
    scripts: list[Script], seed: int, faults: float
) -> None:
    with folder() as base:
        play(base, [[("push", "main")], *scripts], seed, faults)
        part = NamespaceBucket(FolderBucket(base / "bucket"), "")
        standing = {name: one.ref for (_, name), one in refs.read_listed(part, 1).items()}
        there = check_whole(base / "bucket", base / "look") if standing else {}
        assert there == {f"origin/{name}": ref.commit for name, ref in standing.items() if ref.commit is not None}
        if standing:
            for _ in range(3):  # what is left of an interrupted gc is finished by the next, and harms nothing
                collect(remote(base / "bucket"), AT_ONCE)
            assert check_whole(base / "bucket", base / "again") == there
