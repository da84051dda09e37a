"""Checkpoints by themselves: `kill -9` costs at most so many tokens and one capture, and none of them is wrong."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from test_engine_snapshot import BIG, fresh, python, working

import thaw
from thaw import Sampling
from thaw.core.errors import Conflict, InvalidRequest, NotFound
from thaw.engines.base import Engine
from thaw.repo import Repository
from thaw.snapshot import CheckpointRing, RequestQueue, restore_checkpoint
from thaw.snapshot.ring import FOLDER, newest

SOAK = bool(os.environ.get("THAW_SOAK"))
EVERY = 24
PLAN = {
    **BIG, "slow": {"step_s": 0.001}, "max_num_seqs": 4, "num_requests": 5, "num_parked": 1, "max_tokens": 20_000,
    "every": EVERY,
}  # fmt: skip
SLACK = 40
"""Tokens of a request that come between the moment when a checkpoint is due and the one when it is begun."""


class Life:
    """What a process said before it was killed."""

    def __init__(self, lines: list[str]) -> None:
        self.seen: dict[str, list[int]] = {}
        self.restored: dict[str, int] | None = None
        self.done: list[dict[str, int]] = []
        self.begun: list[dict[str, int]] = []
        self.after: list[dict[str, int]] = []
        for line in lines:
            said = json.loads(line)
            if "more" in said:
                self.seen.setdefault(said["id"], []).extend(said["more"])
            self.restored = said.get("restored", self.restored)
            assert not said.get("missed")
            if "done" in said:
                self.done.append(said["done"])
                self.after.append(said["after"])
            self.begun += [said["begun"]] if "begun" in said else []


def life(plan: dict[str, Any], folder: Path, seconds: float) -> Life:
    """Start it, let it write a checkpoint, and kill it some time after that."""
    path = folder / "said.jsonl"
    with path.open("w") as out:
        process = python("checkpoint", plan, folder, out)
    while '"done"' not in path.read_text():
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    said = path.read_text()
    return Life(said[: said.rfind("\n") + 1].splitlines())


def begun_in_time(one: Life) -> None:
    """Each checkpoint is begun so many tokens after the one before it was begun, or, where those came while that one
    was still being written, right after it."""
    for first, then, after in zip(one.begun, one.begun[1:], one.after, strict=False):
        for id in first.keys() & then.keys():
            assert then[id] <= max(first[id] + EVERY, after.get(id, 0)) + SLACK


def kills(num: int, tmp_path: Path, engine: Engine) -> None:
    plan = {**PLAN, "folder": str(tmp_path / "r")}
    chance = random.Random(5)
    before: Life | None = None
    told: dict[str, list[int]] = {}
    for _ in range(num):
        now = life(plan, tmp_path, chance.uniform(0.0, 0.15))
        for id, tokens in now.seen.items():
            shared = min(len(tokens), len(told.get(id, [])))
            assert tokens[:shared] == told.get(id, [])[:shared]  # none is wrong
            told[id] = max(told.get(id, []), tokens, key=len)
        begun_in_time(now)
        if before is not None:
            assert now.restored is not None
            assert all(now.restored[id] >= before.done[-1][id] for id in now.restored)  # nothing older was restored
        before = now
    repo = thaw.open(tmp_path / "r", engine=engine, create=False)
    back = restore_checkpoint(repo)
    for id, seen in told.items():
        stream = back.queue.request(id).stream(seen=seen)
        assert all(piece.token_ids for _, piece in zip(range(3), stream, strict=False))
    back.queue.close()
    assert repo.log(all=True) == []
    with pytest.raises(NotFound):
        repo.reflog("detached")
    assert repo.fsck().ok


@pytest.mark.longer_in_soak("100 kills in place of 20", receipt="engine-checkpoints", covers=("src/thaw/snapshot",))
def test_after_kills_no_token_is_wrong_and_few_were_generated_again(tmp_path: Path, engine: Engine) -> None:
    kills(100 if SOAK else 20, tmp_path, engine)


def test_a_checkpoint_goes_on_as_if_nothing_had_happened(slow_engine: Engine, engine: Engine, tmp_path: Path) -> None:
    repo = thaw.open(tmp_path / "slow", engine=slow_engine)
    queue, sessions = working(repo, 4, max_num_seqs=3)
    parked = repo.session(seed=9)
    parked.append("parked. ")
    parked.park()
    with CheckpointRing(queue, seconds=60.0, tokens=None) as ring:
        first = ring.checkpoint()
        assert parked.view().parked and len(first.sessions) == 5
        second = ring.checkpoint()
        assert {one.commit for one in first.of("parked")} == {one.commit for one in second.of("parked")}
    assert queue.wait(60)
    whole = {one.id: one.result() for one in queue.known()}
    back = restore_checkpoint(fresh(repo, engine))
    assert back.snapshot.commit == second.commit and back.num_recomputed_tokens == 0
    assert back.queue.wait(60) and {one.id: one.result() for one in back.queue.known()} == whole
    with pytest.raises(Conflict):
        restore_checkpoint(fresh(repo, engine))
    session = back.queue.request("r0").session  # it commits to the repository, not to the ring
    done = session.commit("done", branch="main")
    assert back.queue.repo.resolve("main").commit == done.commit and sessions


def test_a_ring_keeps_so_many_and_the_older_one_where_the_newest_is_damaged(repo: Repository, engine: Engine) -> None:
    session = repo.session(seed=1)
    session.append("The river. " * 8)
    queue = RequestQueue(repo)
    ring = CheckpointRing(queue, tokens=None, seconds=1000.0, keep=2)
    points = []
    for _ in range(5):
        session.append("More of it. " * 3)
        points.append((ring.checkpoint().commit, session.num_tokens))
    found = newest(repo)
    assert [one.commit for one in found] == [points[4][0], points[3][0]]
    store = ring._store
    assert len(list(store.commits())) <= 3 * 3  # a top, a group and a session each; gc took the rest but one
    (entry,) = found[0].sessions
    segments = store.get(store.get(store.get(entry.prefix).nodes[0]).entries[-1].segment)  # type: ignore[union-attr]
    place = store.locate([segments.blobs["full"][0]])[segments.blobs["full"][0]]  # type: ignore[union-attr]
    ring.close()
    path = repo.path / FOLDER / "packs" / place.pack
    data = bytearray(path.read_bytes())
    data[place.offset] ^= 1
    path.write_bytes(data)
    (again,) = restore_checkpoint(repo).sessions.values()
    assert again.num_tokens == points[3][1]


def test_checkpoints_come_by_tokens_and_by_seconds(slow_engine: Engine, tmp_path: Path) -> None:
    repo = thaw.open(tmp_path / "slow", engine=slow_engine)
    for more in ({"tokens": 8}, {"tokens": None, "seconds": 0.02}):
        queue = RequestQueue(repo)
        with CheckpointRing(queue, **more) as ring:
            request = queue.submit(repo.session(seed=1), "The river. ", Sampling(max_tokens=300, ignore_eos=True))
            request.result(60)
            assert ring.error is None and 2 <= ring.number <= 40
        queue.close()


def test_a_ring_that_comes_later_hears_of_what_runs_already(slow_engine: Engine, tmp_path: Path) -> None:
    queue, _ = working(thaw.open(tmp_path / "slow", engine=slow_engine), 2)
    with CheckpointRing(queue, tokens=8) as ring:
        assert queue.wait(60)
        assert ring.number >= 1


def test_what_is_no_ring_is_refused(repo: Repository) -> None:
    queue = RequestQueue(repo)
    for wrong in ({"tokens": None}, {"tokens": 0}, {"seconds": 0.0}, {"keep": 0}, {"seconds": float("nan")}):
        with pytest.raises(InvalidRequest):
            CheckpointRing(queue, **wrong)
    with pytest.raises(NotFound, match="no checkpoints"):
        restore_checkpoint(repo)
    with CheckpointRing(queue) as ring, pytest.raises(InvalidRequest, match="no session is live"):
        ring.checkpoint()
