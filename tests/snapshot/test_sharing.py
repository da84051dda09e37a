"""Sessions that begin with the same KV share it after a restore as they did before: memory, bytes read, and no more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import thaw
from thaw import Sampling
from thaw.core.cache import token_nbytes
from thaw.engines import restoring as loading
from thaw.engines.base import Engine, SessionRef
from thaw.repo import Repository, Session
from thaw.repo.timeline import read_entries
from thaw.snapshot import EngineSnapshot, RestoredEngine, restore, restoring, snapshot

TRUNK = "The river is long and slow, and nobody knows its name. " * 11  # 605 tokens: two whole pages and a part
SHORT, LONG = (Sampling(max_tokens=n, ignore_eos=True, temperature=0.8) for n in (20, 40))


def family(repo: Repository, *, committed: bool) -> list[Session]:
    """A trunk, its children, which have said something each, a grandchild, and a stranger."""
    trunk = repo.session(seed=1)
    trunk.append(TRUNK)
    if committed:
        trunk.commit("read", branch="main")
    children = list(trunk.fork(4))
    for child in children:
        child.generate("", SHORT)
    (grandchild,) = children[0].fork(1)
    grandchild.append("And then? ")
    children[3].park()
    stranger = repo.session(seed=2)
    stranger.append(TRUNK.upper())
    return [trunk, *children, grandchild, stranger]


def pages(engine: Any) -> int:
    """How many the engine has memory for."""
    extents = {run.extent for live in engine._sessions.values() for run in live.kv.runs}
    return sum(extent.num_pages for extent in extents)


def distinct_nbytes(repo: Repository, back: RestoredEngine) -> int:
    """Of all KV that the sessions have, each stored segment once."""
    entries = {
        (entry.segment, entry.length)
        for one in back.snapshot.sessions
        for entry in read_entries(repo.store, repo.store.get(one.prefix))  # type: ignore[arg-type]
    }
    return token_nbytes(repo.engine.info.groups) * sum(length for _, length in entries)


def went_on(sessions: list[Session]) -> list[tuple[int, ...]]:
    return [session.generate("And now? ", LONG).token_ids for session in sessions]


def taken(repo: Repository) -> tuple[list[SessionRef], EngineSnapshot, list[tuple[int, ...]]]:
    """The family's names, its snapshot, and what each of it says after that."""
    sessions = family(repo, committed=True)
    names = [session.engine_ref for session in sessions]
    found = snapshot(repo, "engine")
    return names, found, went_on(sessions)


def check(here: Engine, there: Engine, path: Path, *, committed: bool) -> None:
    with thaw.open(path, engine=here) as repo:
        sessions = family(repo, committed=committed)
        before = pages(here)
        names = [session.engine_ref for session in sessions]
        assert not snapshot(repo, "engine").missed
        whole = went_on(sessions)
    with thaw.open(path, engine=there) as repo:
        back = restore(repo, "engine")
        again = [back.sessions[name] for name in names]
        assert again[4].view().parked and not back.missed and back.num_recomputed_tokens == 0
        assert sum(one.proof.nbytes for one in again if one.proof) == distinct_nbytes(repo, back)
        assert pages(there) <= before
        assert went_on(again) == whole


@pytest.mark.parametrize("committed", [True, False])
def test_what_sessions_had_in_common_is_read_once_and_shared(engine: Engine, tmp_path: Path, committed: bool) -> None:
    with thaw.load_engine("fake") as there:
        check(engine, there, tmp_path / "r", committed=committed)


@pytest.mark.slow("loads a model twice")
def test_it_is_on_transformers_too(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = str(tiny_model("llama"))
    with thaw.load_engine("transformers", model=model) as here, thaw.load_engine("transformers", model=model) as there:
        check(here, there, tmp_path / "r", committed=True)


@pytest.mark.parametrize("blindly", [False, True])
def test_what_is_not_the_same_is_not_shared(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blindly: bool
) -> None:
    """Whichever session is named: the engine compares blobs. One that did not would be seen."""
    with thaw.open(tmp_path / "r", engine=engine) as repo:
        names, found, whole = taken(repo)
    child = next(at for at, one in enumerate(found.sessions) if one.session == names[2])
    monkeypatch.setattr(restoring, "trunks", lambda store, states: [child if at > child else None for at in range(7)])
    if blindly:
        monkeypatch.setattr(loading, "num_shared", lambda plan, loaded: min(plan.num_kv, sum(x.length for x in loaded)))
    with thaw.load_engine("fake") as there, thaw.open(tmp_path / "r", engine=there) as repo:
        back = restore(repo, "engine")
        assert (went_on([back.sessions[name] for name in names]) == whole) is not blindly


def test_where_the_one_that_others_share_with_cannot_be_opened_they_read_for_themselves(
    engine: Engine, tmp_path: Path
) -> None:
    with thaw.open(tmp_path / "r", engine=engine) as repo:
        names, found, whole = taken(repo)
        (first, *_) = [one for one in found.sessions if one.session == names[1]]
        state = repo.store.get(first.prefix)
        segment = repo.store.get(read_entries(repo.store, state)[-1].segment)  # type: ignore[arg-type]
        blob = segment.blobs["full"][0]  # type: ignore[union-attr]
        place = repo.store.locate([blob])[blob]
        with (repo.store.packs / place.pack).open("r+b") as file:
            file.seek(place.offset)
            byte = file.read(1)
            file.seek(place.offset)
            file.write(bytes([byte[0] ^ 1]))
    with thaw.load_engine("fake") as there, thaw.open(tmp_path / "r", engine=there) as repo:
        back = restore(repo, "engine")
        assert names[1] in {one.session for one in back.missed}
        left = {name: out for name, out in zip(names, whole, strict=True) if name in back.sessions}
        assert len(left) >= 5 and went_on([back.sessions[name] for name in left]) == list(left.values())
