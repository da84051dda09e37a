"""Values that no person writes are refused by name, in Python as on the command line, and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import thaw
from thaw.core.errors import InvalidRequest
from thaw.core.sampling import Sampling
from thaw.engines.vllm.client.http import VllmHttpTransport
from thaw.repo.repository import Repository

HALF = "\ud800"
"""Half a character, which Python's strings may hold and UTF-8 may not."""
REFUSED: dict[str, Callable[[Repository], Any]] = {
    "a message": lambda repo: repo.session("main").commit(HALF, branch="main"),
    "a note": lambda repo: repo.session("main").commit("m", branch="main", meta={"k": HALF}),
    "a note that is no number": lambda repo: repo.session("main").commit("m", branch="main", meta={"k": float("nan")}),
    "a text": lambda repo: repo.session("main").append(HALF),
    "a prompt": lambda repo: repo.session("main").generate(HALF, Sampling(max_tokens=1)),
    "a branch": lambda repo: repo.branch(HALF),
    "a branch to delete": lambda repo: repo.delete_branch(HALF),
    "a branch to rename": lambda repo: repo.rename(HALF, "x"),
    "a reflog": lambda repo: repo.reflog(HALF),
    "a reflog of nobody": lambda repo: repo.reflog("nobody"),
    "an undo": lambda repo: repo.undo(HALF),
    "a token below all": lambda repo: repo.match([-1]),
    "a token beyond all": lambda repo: repo.match([1, 1 << 70]),
    "too many children": lambda repo: repo.fork("main", 1 << 63),
    "too many moves": lambda repo: repo.reflog("main", limit=1 << 63),
    "fewer than no commits": lambda repo: repo.log(limit=-1),
    "too many commits": lambda repo: repo.log(limit=1 << 63),
    "a time that is none": lambda repo: repo.gc(keep_reflog_s=float("nan")),
    "a time without end": lambda repo: repo.gc(keep_reflog_s=float("inf")),
    "a stop string": lambda _: Sampling(stop=HALF),  # type: ignore[arg-type]
    "stop strings": lambda _: Sampling(stop=("a", HALF)),
    "bad words": lambda _: Sampling(bad_words=HALF),  # type: ignore[arg-type]
    "a grammar": lambda _: Sampling(structured_outputs={"regex": HALF}),  # type: ignore[arg-type]
    "an engine's option": lambda _: thaw.load_engine("fake", modle="x"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name_and_nothing_changes(repo: Repository, name: str) -> None:
    session = repo.session()
    session.append("hello")
    session.commit("read it", branch="main")
    before = (repo.store.refs(), repo.reflog("main"))
    with pytest.raises(InvalidRequest):
        REFUSED[name](repo)
    assert (repo.store.refs(), repo.reflog("main")) == before


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "http://[", f"http://{HALF}/", "http://", "x"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="not the address of a server"):
        VllmHttpTransport.base_of(url)


def test_the_current_branch_may_have_no_moves_yet(repo: Repository) -> None:
    assert repo.reflog(repo.store.head) == []
