"""A repository with a session's state that a thaw to come has written: who meets it says so by name, and whose it is;
all else is read as ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from thaw import Sampling
from thaw.core.errors import NewerFormat
from thaw.core.ids import digest
from thaw.core.objects import Commit, State, encode
from thaw.repo import Repository
from thaw.store import RefUpdate, links

TEXT = "A document that is read once. " * 10
GREEDY = Sampling(temperature=0.0, max_tokens=4, ignore_eos=True)
NEWER = b"thaw.state/9"


class Knowing:
    """What follows links in the thaw to come: its state has those of ours."""

    def __init__(self, decoder: msgspec.json.Decoder[object]) -> None:
        self._decoder = decoder

    def decode(self, data: bytes) -> object:
        return self._decoder.decode(bytes(data).replace(NEWER, b"thaw.state/1"))


@pytest.fixture
def told(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """`main`, and a child of it on `newer`."""
    s = repo.session(seed=1)
    s.append(TEXT)
    tip = s.commit("read", branch="main").commit
    store = repo.store
    ours = store.get_as(tip, Commit)
    data = encode(store.get_as(ours.state, State))[1].replace(b"thaw.state/1", NEWER)
    with monkeypatch.context() as to_come, store.begin() as tx:
        to_come.setattr(links, "_DECODER", Knowing(links._DECODER))
        tx._queue[digest(data)] = data  # type: ignore[index]
        one = tx.put(msgspec.structs.replace(ours, state=digest(data), parents=(tip,), message="newer"))
        tx.commit(RefUpdate("newer", "branch", one, None, "r"))
    return repo


@pytest.mark.parametrize(
    "verb",
    [
        pytest.param(lambda repo: repo.stats(), id="stats"),
        pytest.param(lambda repo: repo.log("newer"), id="log"),
        pytest.param(lambda repo: repo.log(all=True), id="log of all"),
        pytest.param(lambda repo: repo.show("newer"), id="show"),
        pytest.param(lambda repo: repo.diff("main", "newer"), id="diff"),
        pytest.param(lambda repo: repo.verify("newer", num_tokens=2), id="verify"),
        pytest.param(lambda repo: repo.session("newer"), id="session"),
        pytest.param(lambda repo: repo.fork("newer", 2), id="fork"),
        pytest.param(lambda repo: repo.gc(keep_reflog_s=0), id="gc"),
        pytest.param(lambda repo: repo.gc(dry_run=True), id="dry gc"),
        pytest.param(lambda repo: repo.fsck(), id="fsck"),
        pytest.param(lambda repo: repo.fsck(rebuild=True), id="rebuild"),
    ],
)
def test_who_meets_it_says_whose_it_is_and_that_it_is_newer(
    told: Repository, verb: Callable[[Repository], object]
) -> None:
    before = sorted(path.name for path in Path(told.store.packs).iterdir())
    with pytest.raises(NewerFormat, match=r"b3:[0-9a-f]{64}.* is a thaw\.state/9: written by a newer thaw\. Upgrade"):
        verb(told)
    assert sorted(path.name for path in Path(told.store.packs).iterdir()) == before


def test_what_does_not_need_it_goes_on(told: Repository) -> None:
    assert [entry.message for entry in told.log("main")] == ["read"]
    assert len(told.show("main").tokens) == len(TEXT) and told.reflog("main")
    found = told.match((*told.show("main").tokens, 1))
    assert found is not None and found.num_tokens == len(TEXT)
    assert all(law.held is not False for law in told.verify("main", num_tokens=2).laws)
    with told.session("main") as s:
        assert s.generate("", GREEDY).token_ids
        s.commit("on", branch="main")
