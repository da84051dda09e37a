"""A whole engine is snapshotted while it works, killed, and restored by another process: nobody notices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import snapshot_worker as worker

import thaw
from thaw import Sampling
from thaw.core.errors import Conflict, IdentityMismatch, InvalidRequest, LawBroken, NotFound, RefConflict
from thaw.core.ids import CommitId
from thaw.engines.base import Engine
from thaw.repo import Repository, Session
from thaw.snapshot import EngineSnapshot, RequestQueue, manifest, restore, snapshot
from thaw.snapshot.outputs import GivenTokens

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LONG = Sampling(max_tokens=60, ignore_eos=True)
BIG = {
    "engine": "fake", "options": {}, "slow": {"step_s": 0.0003}, "max_num_seqs": 32, "num_requests": 40,
    "num_parked": 4, "max_tokens": 240, "at": 8, "prompt": "The river is long and slow, and nobody knows its name.",
}  # fmt: skip


def python(mode: str, plan: dict[str, Any], folder: Path, out: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    path = folder / f"{mode}.json"
    path.write_text(json.dumps(plan))
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{HERE}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(HERE / "snapshot_worker.py"), mode, str(path)], stdout=out, text=True, env=env
    )


def killed_and_restored(plan: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(what the snapshot had, what clients had taken at the kill, what the other process said)."""
    plan = {**plan, "folder": str(tmp_path / "r")}
    first = python("begin", plan, tmp_path)
    assert first.stdout is not None
    taken, seen = json.loads(first.stdout.readline()), {}
    for _ in range(3):
        seen = json.loads(first.stdout.readline())["seen"]
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = python("restore", {**plan, "seen": seen, "names": taken["names"]}, tmp_path)
    out, _ = second.communicate(timeout=300)
    assert second.returncode == 0
    return taken, seen, json.loads(out)


def check(plan: dict[str, Any], whole: dict[str, list[int]], tmp_path: Path) -> None:
    taken, seen, back = killed_and_restored(plan, tmp_path)
    running = plan["max_num_seqs"]
    waiting = plan["num_requests"] - running
    assert taken["num"] == {"running": running, "waiting": waiting, "parked": plan["num_parked"], "idle": 0}
    assert taken["missed"] == back["missed"] == 0
    assert sum(bool(tokens) for tokens in seen.values()) >= running
    assert back["out"] == whole
    assert back["recomputed"] == 0 and all(back["parked"])
    assert sorted(back["prefilled"])[running - 1] <= 1  # the last sampled token, which had no KV yet


def test_32_decoding_8_waiting_and_4_parked_go_on_in_another_process_as_if_nothing_had_happened(
    tmp_path: Path, engine: Engine
) -> None:
    check(BIG, worker.undisturbed(tmp_path / "whole", BIG, engine), tmp_path)


@pytest.mark.slow("loads a model in two processes")
def test_transformers_goes_on_in_another_process(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    plan = {
        **BIG, "engine": "transformers", "options": {"model": str(tiny_model("llama"))}, "slow": {}, "max_num_seqs": 4,
        "num_requests": 6, "num_parked": 2, "max_tokens": 100,
    }  # fmt: skip
    with worker.engine_of(plan) as engine:
        whole = worker.undisturbed(tmp_path / "whole", plan, engine)
    check(plan, whole, tmp_path)


# -- in one process


def working(repo: Repository, n: int, **more: Any) -> tuple[RequestQueue, list[Session]]:
    """A queue whose requests are in the middle of what they say."""
    queue = more.pop("queue", None) or RequestQueue(repo, **more)
    sessions = [repo.session(seed=i) for i in range(n)]
    for i, session in enumerate(sessions):
        queue.submit(session, f"The river {i}. ", LONG, id=f"r{i}")
    for one in queue.requests()[: queue.max_num_seqs]:
        for piece in one.stream():
            if piece.offset + len(piece.token_ids) > 6:
                break
    return queue, sessions


@pytest.fixture
def taken(slow_engine: Engine, tmp_path: Path) -> tuple[Repository, EngineSnapshot, dict[str, tuple[int, ...]]]:
    """A snapshot of three that ran and one that waited, and what they said in the end."""
    repo = thaw.open(tmp_path / "slow", engine=slow_engine)
    queue, _ = working(repo, 4, max_num_seqs=3)
    found = snapshot(repo, "engine", queue=queue)
    assert queue.wait(60)
    whole = {f"r{i}": queue.request(f"r{i}").result() for i in range(4)}
    queue.close()
    return repo, found, whole


Taken = tuple[Repository, EngineSnapshot, dict[str, tuple[int, ...]]]


def fresh(repo: Repository, engine: Engine) -> Repository:
    return thaw.open(repo.path, engine=engine, create=False)


def ended(queue: RequestQueue) -> dict[str, tuple[int, ...]]:
    assert queue.wait(60)
    return {f"r{i}": queue.request(f"r{i}").result() for i in range(4)}


def test_a_stream_goes_on_at_any_offset_and_with_the_same_text(taken: Taken, engine: Engine) -> None:
    repo, _, whole = taken
    back = restore(fresh(repo, engine), "engine")
    assert ended(back.queue) == whole
    request = back.queue.request("r0")
    for offset in (0, 1, 5, len(whole["r0"]) - 1, len(whole["r0"])):
        pieces = list(request.stream(offset))
        assert tuple(t for piece in pieces for t in piece.token_ids) == whole["r0"][offset:]
    assert "".join(piece.text for piece in request.stream()) == request.text == request.session.turns[-1].text


def test_one_token_that_differs_from_what_was_given_out_is_an_error(taken: Taken, engine: Engine) -> None:
    repo, _, whole = taken
    back = restore(fresh(repo, engine), "engine")
    wrong = [*whole["r1"][:9], whole["r1"][9] ^ 1]
    with pytest.raises(LawBroken, match=r"token 9 of its output is"):
        list(back.queue.request("r1").stream(seen=wrong))
    with pytest.raises(LawBroken, match="were given out before"):
        list(back.queue.request("r1").stream(len(whole["r1"]) + 1))
    assert list(back.queue.request("r1").stream(seen=whole["r1"])) == []


def test_one_that_has_ended_is_heard_to_its_end(repo: Repository) -> None:
    """Its client may have taken less than all of it."""
    queue = RequestQueue(repo)
    request = queue.submit(repo.session(seed=1), "The river. ", LONG, id="r0")
    whole = request.result(60)
    snapshot(repo, "engine", queue=queue)
    with thaw.load_engine("fake") as engine:
        back = restore(fresh(repo, engine), "engine")
        assert back.queue.request("r0").status == "finished" and back.queue.request("r0").text == request.text
        assert [t for piece in back.queue.request("r0").stream(50) for t in piece.token_ids] == list(whole[50:])


def rewritten(repo: Repository, found: EngineSnapshot, change: Callable[[list[Any]], None]) -> None:
    """The same snapshot, with entries that somebody changed."""
    entries = list(found.sessions)
    change(entries)
    manifest.write(repo.store, "changed", repo.engine.identity(), found.record, entries, replace=False)


def test_the_state_of_another_session_does_not_go_on_in_its_place(taken: Taken, engine: Engine) -> None:
    repo, found, whole = taken

    def swap(entries: list[Any]) -> None:
        a, b = entries[0], entries[1]
        fields = ("commit", "prefix", "num_tokens", "num_kv")
        entries[0] = msgspec.structs.replace(a, **{name: getattr(b, name) for name in fields})
        entries[1] = msgspec.structs.replace(b, **{name: getattr(a, name) for name in fields})

    rewritten(repo, found, swap)
    back = restore(fresh(repo, engine), "changed")
    for id in ("r0", "r1"):
        with pytest.raises(LawBroken, match="not the ones"):
            back.queue.request(id).result(60)
        assert back.queue.request(id).token_ids == ()
    assert {one.request for one in back.missed} <= {"r0", "r1"}
    assert [back.queue.request(id).result(60) for id in ("r2", "r3")] == [whole["r2"], whole["r3"]]


def test_what_was_given_out_must_come_again(taken: Taken, engine: Engine) -> None:
    """The digest of one token more than was captured, and of another token."""
    repo, found, whole = taken

    def lie(entries: list[Any]) -> None:
        request = entries[0].request
        given = GivenTokens(num=len(whole["r0"]) - 2, digest="b3:" + "0" * 64)
        entries[0] = msgspec.structs.replace(entries[0], request=msgspec.structs.replace(request, given=given))

    rewritten(repo, found, lie)
    back = restore(fresh(repo, engine), "changed")
    with pytest.raises(LawBroken, match="58 tokens that were given out before"):
        list(back.queue.request("r0").stream())
    assert back.queue.request("r0").token_ids == ()


def test_another_model_is_refused_and_the_snapshot_can_still_be_restored(taken: Taken, engine: Engine) -> None:
    repo, _, whole = taken
    with thaw.load_engine("fake", seed=7) as other, fresh(repo, other) as wrong:
        with pytest.raises(IdentityMismatch):
            restore(wrong, "engine")
        assert wrong.live_sessions() == []
    assert ended(restore(fresh(repo, engine), "engine").queue) == whole


def test_a_second_restore_is_refused_or_a_fork_with_other_seeds(taken: Taken, engine: Engine) -> None:
    repo, _, whole = taken
    here = fresh(repo, engine)
    assert ended(restore(here, "engine").queue) == whole
    with pytest.raises(Conflict, match="was restored on"):
        restore(here, "engine")
    forks = [ended(restore(here, "engine", fork=True).queue) for _ in range(2)]
    for id in whole:
        assert len({whole[id], *(fork[id] for fork in forks)}) == 3
        assert len(forks[0][id]) == len(whole[id])


def test_forks_first_leave_the_snapshot_to_whoever_takes_it_over(taken: Taken, engine: Engine) -> None:
    repo, _, whole = taken
    here = fresh(repo, engine)
    assert ended(restore(here, "engine", fork=True).queue) != whole
    assert ended(restore(here, "engine").queue) == whole


def test_of_two_restores_at_once_one_is_told_to_go_away(taken: Taken, engine: Engine) -> None:
    repo, found, _ = taken
    here = fresh(repo, engine)
    told = manifest.RestoredRecord(time_s=1.0, engine="fake", device="cpu", taken=True)
    manifest.note_restored(repo.store, found, engine.identity(), told)
    with pytest.raises(RefConflict):
        manifest.note_restored(repo.store, found, engine.identity(), told)
    with pytest.raises(Conflict):
        restore(here, "engine")
    assert here.live_sessions() == []


def test_what_is_damaged_is_named_and_the_others_go_on(taken: Taken, engine: Engine) -> None:
    repo, found, whole = taken
    victim = found.sessions[0]
    state = repo.store.get(repo.resolve(victim.commit[3:]).state)
    node = repo.store.get(state.nodes[0])  # type: ignore[union-attr]
    segment = repo.store.get(node.entries[0].segment)  # type: ignore[union-attr]
    blob = segment.blobs["full"][0]  # type: ignore[union-attr]
    place = repo.store.locate([blob])[blob]
    with (repo.store.packs / place.pack).open("r+b") as file:
        file.seek(place.offset)
        byte = file.read(1)
        file.seek(place.offset)
        file.write(bytes([byte[0] ^ 1]))
    back = restore(fresh(repo, engine), "engine")
    assert victim.request is not None
    assert [(one.session, one.request) for one in back.missed] == [(victim.session, victim.request.id)]
    assert "corrupt-blob" in back.missed[0].why and victim.session not in back.sessions
    for id in {"r0", "r1", "r2", "r3"} - {victim.request.id}:
        assert back.queue.request(id).result(60) == whole[id]


def test_a_snapshot_is_pushed_and_restored_on_another_host(taken: Taken, engine: Engine, tmp_path: Path) -> None:
    repo, _, whole = taken
    repo.add_remote("origin", f"file://{tmp_path}/bucket")
    repo.push("engine", remote="origin")
    there = thaw.clone(f"file://{tmp_path}/bucket", tmp_path / "there", engine=engine, branch="engine")
    back = restore(there, "engine")
    assert ended(back.queue) == whole and back.num_recomputed_tokens == 0
    there.push("engine", remote="origin")  # forward: that it was restored
    repo.fetch(remote="origin")
    repo.pull("engine", remote="origin")
    with pytest.raises(Conflict, match="was restored"):
        restore(repo, "engine")


def test_a_snapshot_is_a_commit_that_gc_keeps_and_verbs_can_show(taken: Taken) -> None:
    repo, found, _ = taken
    repo.gc(keep_reflog_s=0)
    assert repo.fsck().ok and manifest.read(repo.store, "engine") == found
    entries = repo.log("engine")
    assert len(entries) == 6 and entries[0].commit == found.commit  # the top, one group, four sessions
    assert repo.show("engine").tokens == ()
    assert len(found.prefixes) == 3 and all(repo.store.has(prefix) for prefix in found.prefixes)


def test_sessions_keep_their_place_in_history(repo: Repository, tmp_path: Path) -> None:
    session = repo.session()
    session.append("one ")
    first = session.commit("read", branch="main")
    session.append("two ")
    snapshot(repo, "engine")
    with thaw.load_engine("fake") as engine, fresh(repo, engine) as there:
        back = restore(there, "engine")
        (again,) = back.sessions.values()
        assert (again.branch, again.parent, again.text) == ("main", first.commit, "one two ")
        assert there.resolve("main").commit == first.commit
        second = again.commit("more")
        assert second.branch == "main" and there.resolve("main~1").commit == first.commit


def test_sessions_of_a_namespace_are_a_snapshot_of_their_own(repo: Repository) -> None:
    mine, theirs = repo.session(), repo.within("acme").session()
    mine.append("one ")
    theirs.append("two ")
    assert len(snapshot(repo, "engine").sessions) == len(snapshot(repo.within("acme"), "engine").sessions) == 1
    with thaw.load_engine("fake") as engine, fresh(repo, engine) as there:
        (again,) = restore(there.within("acme"), "engine").sessions.values()
        assert again.text == "two " and again.namespace == "acme"
        (own,) = restore(there, "engine").sessions.values()
        assert own.text == "one "


def test_a_policy_is_taken_over_with_its_sessions(repo: Repository) -> None:
    repo.engine.set_policy("7")
    session = repo.session(seed=3)
    session.append("one ")
    assert snapshot(repo, "engine").record.policy == "7"
    whole = session.generate("", LONG).token_ids
    with thaw.load_engine("fake") as engine, fresh(repo, engine) as there:
        (again,) = restore(there, "engine").sessions.values()
        assert engine.policy_version == "7" and again.generate("", LONG).token_ids == whole


def test_a_restore_that_fails_leaves_the_engine_its_policy(repo: Repository) -> None:
    repo.engine.set_policy("7")
    session = repo.session()
    session.append("one ")
    snapshot(repo, "engine")
    with thaw.load_engine("fake", seed=7, policy="3") as other, fresh(repo, other) as there:
        with pytest.raises(IdentityMismatch):
            restore(there, "engine")
        assert other.policy_version == "3"


def test_a_session_that_cannot_be_captured_is_named_in_the_snapshot(repo: Repository) -> None:
    stale, good = repo.session(), repo.session()
    stale.append("old ")
    repo.engine.set_policy("next")
    good.append("new ")
    found = snapshot(repo, "engine")
    assert [one.session for one in found.missed] == [stale.ref] and len(found.sessions) == 1
    assert manifest.read(repo.store, "engine").missed == found.missed


def test_names_that_cannot_be_given_are_refused(repo: Repository) -> None:
    with pytest.raises(InvalidRequest, match="no session is live"):
        snapshot(repo, "engine")
    session = repo.session()
    session.append("one ")
    session.commit("read", branch="main")
    with pytest.raises(RefConflict, match="a branch already"):
        snapshot(repo, "main", replace=True)
    first = snapshot(repo, "engine")
    with pytest.raises(RefConflict, match="a snapshot already"):
        snapshot(repo, "engine")
    assert snapshot(repo, "engine", replace=True).commit != first.commit
    with pytest.raises(InvalidRequest, match="a session's"):
        restore(repo, "main")
    with pytest.raises(NotFound):
        restore(repo, "nothing")


def test_more_sessions_than_a_commit_has_parents_are_kept(repo: Repository) -> None:
    sessions = [repo.session(seed=i) for i in range(270)]
    for i, session in enumerate(sessions):
        session.append(f"{i} ")
    found = snapshot(repo, "engine")
    assert len(found.sessions) == 270
    assert all(len(repo.store.get(CommitId(one.commit)).parents) <= 16 for one in repo.log("engine"))  # type: ignore[union-attr]
    again = manifest.read(repo.store, "engine")
    assert again.sessions == found.sessions
    assert [one.session for one in again.sessions] == [one.ref for one in sessions]
