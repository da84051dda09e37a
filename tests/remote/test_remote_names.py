"""Names in a remote that have no place here: a push refuses them before it sends anything, and they stop no fetch.

Whoever may push could otherwise make a remote that nobody can clone any more.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hosts import commit, files, remote, tokens

import thaw
from thaw.core.errors import BadPoint, InvalidRequest, RefConflict
from thaw.core.points import MAX_NAME
from thaw.engines.base import Engine
from thaw.remote import refs
from thaw.remote.layout import Kind
from thaw.remote.push import PushWish, push
from thaw.repo import Repository
from thaw.store import Store

LONG = "x" * (MAX_NAME - 3)


@pytest.fixture
def odd(here: Repository, bucket: Path, tmp_path: Path) -> list[tuple[Kind, str]]:
    """Beside `main` the remote has names that another host could give it: its own name for the remote is short."""
    commit(here.store, tokens(30), branch="main")
    here.push("main")
    names: list[tuple[Kind, str]] = [("branch", LONG), ("tag", "origin/foo"), ("tag", "HEAD"), ("branch", "foo")]
    with Store.init(tmp_path / "another") as store:
        tip = commit(store, tokens(40), branch="main")
        push(store, remote(bucket, name="r"), [PushWish(kind, name, tip) for kind, name in names])
    seen = refs.read(remote(bucket).bucket, "branch", "foo")
    assert seen is not None
    late = refs.place(remote(bucket).bucket, "tag", "main")  # past the check: it was pushed at the same time
    assert refs.move(remote(bucket).bucket, late, seen.ref.commit, seen.ref.manifest, "push: new")
    return [("branch", LONG), ("tag", "origin/foo"), ("tag", "HEAD"), ("tag", "main")]


def test_names_that_have_no_place_here_stop_no_clone_and_no_fetch(
    odd: list[tuple[Kind, str]], here: Repository, far_engine: Engine, bucket: Path, tmp_path: Path
) -> None:
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine) as there:
        assert [ref.name for ref in there.store.refs()] == ["main", "origin/foo", "origin/main"] and there.tags() == []
        assert there.resolve("origin/main").commit == here.resolve("main").commit
    fetched = {(ref.kind, ref.name): ref.outcome for ref in here.fetch().refs}
    assert {one for one, outcome in fetched.items() if outcome == "left-out"} == set(odd)
    assert fetched["branch", "origin/foo"] == "new" and fetched["branch", "origin/main"] == "up-to-date"
    with thaw.clone(bucket.as_uri(), tmp_path / "names", refs_only=True) as names:
        assert names.resolve("origin/foo").commit == here.resolve("origin/foo").commit
    for ask in (lambda: here.fetch(LONG), lambda: thaw.clone(bucket.as_uri(), tmp_path / "long", branch=LONG)):
        with pytest.raises(InvalidRequest, match=f"origin/x.* {MAX_NAME} at most"):
            ask()
    with pytest.raises(BadPoint, match=r"'a\.\.b' cannot name a branch"):
        thaw.clone(bucket.as_uri(), tmp_path / "long", branch="a..b")
    assert not (tmp_path / "long").exists()


def test_what_has_no_place_here_can_be_deleted_there(odd: list[tuple[Kind, str]], here: Repository) -> None:
    for kind, name in odd:
        if (kind, name) != ("tag", "main"):
            assert [(ref.kind, ref.outcome) for ref in here.push(name, delete=True).refs] == [(kind, "deleted")]
    assert [ref.name for ref in here.fetch().refs if ref.outcome == "left-out"] == ["main"]


def test_a_branch_whose_point_would_have_too_long_a_name_is_refused_before_anything_is_sent(
    here: Repository, bucket: Path
) -> None:
    commit(here.store, tokens(30), branch="main")
    here.branch(LONG, "main")
    with pytest.raises(InvalidRequest, match="origin/x"):
        here.push(all=True)
    assert not files(bucket, "refs") and not files(bucket, "packs")
    here.branch(LONG[:-5], "main")
    assert here.push(LONG[:-5]).refs[0].outcome == "new"
    assert here.resolve(f"origin/{LONG[:-5]}").commit == here.resolve("main").commit


@pytest.mark.parametrize("first", ["branch", "tag"])
def test_a_name_is_a_branch_or_a_tag_in_a_remote(here: Repository, bucket: Path, tmp_path: Path, first: str) -> None:
    commit(here.store, tokens(30), branch="main")
    here.push("main")
    with Store.init(tmp_path / "another") as store:
        tip = commit(store, tokens(40), branch="main")
        make = [PushWish("branch", "v1", tip), PushWish("tag", "v1", tip)]
        there = remote(bucket)
        push(store, there, [one for one in make if one.kind == first])
        packs = files(bucket, "packs")
        with pytest.raises(RefConflict, match=f"has a {first} 'v1'"):
            push(store, there, [one for one in make if one.kind != first])
        assert files(bucket, "packs") == packs
        push(store, there, [PushWish("branch" if first == "branch" else "tag", "v1", None)])
        push(store, there, [one for one in make if one.kind != first])  # a tombstone is nobody's name


def test_a_tracking_point_is_not_deleted_as_a_tag(here: Repository) -> None:
    commit(here.store, tokens(30), branch="main")
    here.push("main")
    with pytest.raises(InvalidRequest, match="only fetch and push move it"):
        here.delete_tag("origin/main")
    assert here.resolve("origin/main").commit == here.resolve("main").commit
