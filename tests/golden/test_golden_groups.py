"""The golden repository of cache groups stays readable, also rebuilt; and a thaw from before refuses it by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from thaw.core import canonical, objects
from thaw.core.cache import FullKV, LatentKV, PointState, SlidingKV, nbytes_at
from thaw.core.errors import NewerFormat, NotKept
from thaw.core.identity import GroupedIdentity, ModelIdentity
from thaw.core.ids import digest
from thaw.core.objects import GroupedSegment, Segment, State
from thaw.data.pack import read_blob
from thaw.data.tiers.folder import folder_mount
from thaw.engines.base import HydratePlan
from thaw.repo import cover
from thaw.repo.hydrate import make_plan
from thaw.repo.resolve import resolve
from thaw.repo.timeline import Timeline, read, read_state
from thaw.store import Store, fsck

HERE = Path(__file__).parent
KNOWN = json.loads((HERE / "groups.json").read_text())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return Path(shutil.copytree(HERE / "groups", tmp_path / "groups"))


def line_of(store: Store, name: str) -> Timeline:
    return read(store, read_state(store, resolve(store, name).state))


def plan_of(store: Store, line: Timeline, token: int) -> HydratePlan:
    return make_plan(store, folder_mount(store.uuid, store.packs), line, token)


@pytest.mark.parametrize("rebuilt", [False, True])
def test_it_is_whole_and_says_what_it_was_made_of(path: Path, rebuilt: bool) -> None:
    assert {pack.name: digest(pack.read_bytes()) for pack in (path / "packs").iterdir()} == KNOWN["packs"]
    if rebuilt:
        (path / "thaw.db").unlink()
        assert fsck(path, rebuild=True).ok
    assert fsck(path).problems == []
    with Store.open(path) as store:
        assert {ref.name: ref.target for ref in store.refs()} == {name: KNOWN["ids"][name] for name in ("main", "fork")}
        line = line_of(store, "main")
        assert [type(group) for group in line.groups] == [FullKV, SlidingKV, LatentKV, PointState]
        assert type(store.get(line.state.model)) is GroupedIdentity
        assert [type(segment) for segment in line.segments] == [GroupedSegment, GroupedSegment]
        assert [segment.first_of("sliding") for segment in line.segments] == [171, 261]
        assert [[point.token for point in segment.states] for segment in line.segments] == [[200], [290, 291]]
        assert cover.resumable(line) == [201, 291, 292]
        assert cover.resumable(line_of(store, "fork")) == [201, 205, 206]


def test_a_plan_names_what_its_point_needs_and_all_bytes_verify(path: Path) -> None:
    with Store.open(path) as store:
        for name, token in (("main", 201), ("main", 291), ("main", 292), ("fork", 201), ("fork", 205), ("fork", 206)):
            line = line_of(store, name)
            plan = plan_of(store, line, token)
            assert (plan.num_kv, [point.token for point in plan.points]) == (token - 1, [token - 1])
            places = [p for piece in (*plan.slices, *plan.points) for ids in piece.blobs.values() for p in ids]
            assert sum(len(read_blob(store.packs, place)) for place in places) >= nbytes_at(line.groups, plan.num_kv)
        late = plan_of(store, line_of(store, "main"), 292)
        assert [sorted(piece.blobs) for piece in late.slices] == [["full", "latent"], ["full", "latent", "sliding"]]
        assert [piece.first for piece in late.slices] == [{}, {"sliding": 261}]
        with pytest.raises(NotKept, match=r"cannot continue from token 250.*201, 291, 292"):
            plan_of(store, line_of(store, "main"), 250)


def test_a_thaw_from_before_refuses_it_by_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(path) as store:
        line = line_of(store, "main")
        written = [objects.encode(one)[1] for one in (store.get(line.state.model), *line.segments)]
    monkeypatch.setattr(canonical, "NEWEST", {"thaw.turn": 2})
    for data in written:
        with pytest.raises(NewerFormat, match=r"is a thaw\.(model|segment)/2: written by a newer thaw"):
            canonical.decode(data, ModelIdentity | Segment | State)  # type: ignore[arg-type]
