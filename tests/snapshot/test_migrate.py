"""Sessions move to another engine while they are followed: no token is lost or comes twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_engine_snapshot import working

import thaw
from thaw import Sampling
from thaw.core.errors import Busy, IdentityMismatch, InvalidRequest
from thaw.engines.base import Engine
from thaw.repo import Repository
from thaw.snapshot import QueuedRequest, RequestQueue, migrate

LONG = Sampling(max_tokens=60, ignore_eos=True)


@pytest.fixture
def here(tmp_path: Path, slow_engine: Engine) -> Iterator[Repository]:
    with thaw.open(tmp_path / "slow", engine=slow_engine) as repo:
        yield repo


@pytest.fixture
def whole(tmp_path: Path, engine: Engine) -> dict[str, tuple[int, ...]]:
    with thaw.open(tmp_path / "whole", engine=engine) as repo:
        queue, _ = working(repo, 4)
        assert queue.wait(60)
        return {one.id: one.result() for one in queue.known()}


def test_all_sessions_go_on_in_the_other_engine_and_followers_notice_nothing(
    here: Repository, engine: Engine, whole: dict[str, tuple[int, ...]]
) -> None:
    source, sessions = working(here, 4, max_num_seqs=3)
    parked = here.session(seed=9)
    parked.append("parked. ")
    parked.park()
    heard: dict[str, list[int]] = {one.id: [] for one in source.known()}

    def follow(request: QueuedRequest) -> None:
        for piece in request.stream():
            assert piece.offset == len(heard[request.id])
            heard[request.id] += piece.token_ids

    threads = [threading.Thread(target=follow, args=[one]) for one in source.known()]
    for thread in threads:
        thread.start()
    with thaw.open(here.path, engine=engine) as there, RequestQueue(there) as destination:
        moved = migrate(source, destination)
        assert len(moved) == 5 and source.requests() == [] and here.live_sessions() == []
        assert all(one.session.engine is engine for one in moved)
        assert [one.session.view().parked for one in moved] == [False] * 4 + [True]
        assert destination.wait(60) and destination.known()  # one may have ended before its session moved
        assert {one.id: one.result() for one in (*source.known(), *destination.known())} == whole
        assert all(one.request is None or one.request.num_prefilled <= 40 for one in moved)
        for thread in threads:
            thread.join(60)
    assert {id: tuple(tokens) for id, tokens in heard.items()} == whole
    with pytest.raises(InvalidRequest, match="closed"):
        sessions[0].view()


def test_one_session_moves_and_the_others_stay(
    here: Repository, engine: Engine, whole: dict[str, tuple[int, ...]]
) -> None:
    source, sessions = working(here, 4)
    with thaw.open(here.path, engine=engine) as there, RequestQueue(there) as destination:
        (moved,) = migrate(source, destination, [sessions[2]])
        assert moved.request is not None and moved.request.id == "r2" and moved.seconds < 30
        assert source.wait(60) and destination.wait(60)
        assert {one.id: one.result() for one in (*source.known(), *destination.known())} == whole
        assert {one.id for one in source.known()} == {"r0", "r1", "r3"}


def test_a_session_moves_to_a_repository_of_its_own_through_a_remote(
    here: Repository, engine: Engine, tmp_path: Path, whole: dict[str, tuple[int, ...]]
) -> None:
    source, sessions = working(here, 4)
    with thaw.open(tmp_path / "there", engine=engine) as there, RequestQueue(there) as destination:
        for repo in (here, there):
            repo.add_remote("shared", f"file://{tmp_path}/bucket")
        with pytest.raises(InvalidRequest, match="remote"):
            migrate(source, destination)
        migrate(source, destination, [sessions[0]], remote="shared")
        assert destination.request("r0").result(60) == whole["r0"]
        assert here.branches() == [] and [ref.name for ref in there.branches() if "/" not in ref.name] == []
        done = destination.request("r0").session.commit("done", branch="main")
        assert there.resolve("main").commit == done.commit
        assert source.wait(60)


def test_what_cannot_go_there_stays_and_goes_on_here(
    here: Repository, engine: Engine, whole: dict[str, tuple[int, ...]]
) -> None:
    source, sessions = working(here, 4)
    with thaw.load_engine("fake", seed=7) as other, thaw.open(here.path, engine=other) as there:
        with RequestQueue(there) as destination, pytest.raises(IdentityMismatch):
            migrate(source, destination)
        assert there.live_sessions() == []
    assert source.wait(60) and {one.id: one.result() for one in source.known()} == whole
    with pytest.raises(InvalidRequest, match="one engine"):
        migrate(source, RequestQueue(here))
    with pytest.raises(InvalidRequest, match="namespaces"), thaw.open(here.path, engine=engine) as there:
        migrate(source, RequestQueue(there.within("acme")))
    assert len(sessions) == 4


def test_a_session_that_runs_outside_of_the_queue_is_not_moved(here: Repository, engine: Engine) -> None:
    session = here.session(seed=1)
    stream = session.stream("The river. ", LONG)
    next(iter(stream))
    there = thaw.open(here.path, engine=engine)
    with RequestQueue(there) as destination, pytest.raises(Busy, match="outside of the queue"):
        migrate(RequestQueue(here), destination)
    assert len(stream.result().token_ids) == 60


def test_a_drained_queue_goes_on_where_it_was(here: Repository, whole: dict[str, tuple[int, ...]]) -> None:
    queue, _ = working(here, 4, max_num_seqs=2)
    report = queue.drain()
    assert report.complete and len(report.points) == 2 and report.num_empty == 2
    assert [one.status for one in queue.known()] == ["interrupted", "interrupted", "waiting", "waiting"]
    assert queue.undrain() and queue.wait(60)
    assert {one.id: one.result() for one in queue.known()} == whole


@pytest.mark.slow("loads a model twice")
def test_transformers_is_drained_and_its_sessions_go_on_in_another_engine(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model = str(tiny_model("llama"))
    with thaw.load_engine("transformers", model=model) as first, thaw.load_engine("transformers", model=model) as other:
        with thaw.open(tmp_path / "whole", engine=first) as repo, RequestQueue(repo) as queue:
            working(repo, 3, queue=queue)
            assert queue.wait(60)
            whole = {one.id: one.result() for one in queue.known()}
        here, there = thaw.open(tmp_path / "r", engine=first), thaw.open(tmp_path / "r", engine=other)
        source, sessions = working(here, 3, max_num_seqs=2)
        report = source.drain()
        assert report.complete and len(report.points) == 2 and source.undrain()
        with RequestQueue(there) as destination:
            moved = migrate(source, destination)
            assert destination.wait(60) and len(moved) == len(sessions)
            assert {one.id: one.result() for one in (*source.known(), *destination.known())} == whole


def test_a_queue_waits_while_its_repository_is_drained(here: Repository, whole: dict[str, tuple[int, ...]]) -> None:
    queue, _ = working(here, 4, max_num_seqs=2)
    here.drain()
    queue.wait(0.3)
    assert [one.status for one in queue.known()] == ["interrupted", "interrupted", "waiting", "waiting"]
    assert queue.undrain() and queue.wait(60)
    assert {one.id: one.result() for one in queue.known()} == whole


def test_requests_run_by_priority_and_then_in_order(here: Repository) -> None:
    with RequestQueue(here, max_num_seqs=1) as queue:
        queue.hold()
        for i, priority in enumerate((2, 0, 1, 0)):
            queue.submit(here.session(seed=i), "x. ", Sampling(max_tokens=3), id=f"r{i}", priority=priority)
        assert [one.id for one in queue.requests()] == ["r1", "r3", "r2", "r0"]
        with pytest.raises(Busy, match="already"):
            queue.submit(here.session(), "x. ", LONG, id="r1")
        with pytest.raises(Busy, match="has a request"):
            queue.submit(queue.request("r2").session, "x. ", LONG)
        queue.request("r2").cancel()
        queue.release()
        assert queue.wait(60)
        assert [queue.request(f"r{i}").status for i in range(4)] == ["finished", "finished", "failed", "finished"]
        queue.forget("r2")
        assert len(queue.known()) == 3


def test_an_empty_session_stays_and_is_refused_only_by_name(here: Repository, engine: Engine) -> None:
    source, sessions = working(here, 2)
    empty = here.session()
    with thaw.open(here.path, engine=engine) as there, RequestQueue(there) as destination:
        assert len(migrate(source, destination)) == 2
        assert here.live_sessions() == [empty] and empty.view().tokens == ()
        with pytest.raises(InvalidRequest, match="empty"):
            migrate(source, destination, [empty])
    assert len(sessions) == 2
