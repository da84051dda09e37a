"""A process that works on an engine until it is killed, or that restores what another one left. Says what it has given
out as lines of JSON. Run with a plan: `python snapshot_worker.py whole|begin|restore|checkpoint PLAN.json`."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import thaw
from thaw import Sampling
from thaw.core.errors import NotFound, ThawError
from thaw.engines.base import Completion, Engine
from thaw.repo import Repository, Session
from thaw.snapshot import CheckpointRing, QueuedRequest, RequestQueue, restore, restore_checkpoint, snapshot

NAME = "engine/test"
MANY = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "presence_penalty": 0.2, "ignore_eos": True}


def engine_of(plan: dict[str, Any], **more: Any) -> Engine:
    return thaw.load_engine(plan["engine"], **{**plan["options"], **more})


def sampling(plan: dict[str, Any], number: int) -> Sampling:
    """Several kinds of sampling, so that all of the state counts."""
    own = dict(MANY) if number % 3 else {"temperature": 0.0, "ignore_eos": True, "frequency_penalty": 0.1}
    return Sampling(max_tokens=plan["max_tokens"] + number % 5, **own)  # type: ignore[arg-type]


def fill(repo: Repository, queue: RequestQueue, plan: dict[str, Any]) -> list[Session]:
    """`num_requests` requests, the last ones more urgent than those that wait; parked sessions."""
    queue.hold()
    for i in range(plan["num_requests"]):
        session = repo.session(seed=1000 + i)
        text = f"{plan['prompt']} {i}. "
        if i % 2:
            session.append(text)
            text = ""
        queue.submit(session, text, sampling(plan, i), id=f"r{i}", priority=i % 2)
    parked = []
    for i in range(plan["num_parked"]):
        session = repo.session(seed=2000 + i)
        session.append(f"{plan['prompt']} parked {i}. ")
        session.park()
        parked.append(session)
    queue.release()
    return parked


def wake(session: Session, hits: dict[str, int] | None = None, name: str = "") -> list[int]:
    """What a parked session says, and in `hits` how many tokens its engine had cached."""
    done = session.generate("Go. ", Sampling(max_tokens=8, ignore_eos=True))
    if hits is not None:
        hits[name] = done.num_cached_tokens
    return list(done.token_ids)


def undisturbed(
    folder: Path, plan: dict[str, Any], engine: Engine, hits: dict[str, int] | None = None
) -> dict[str, list[int]]:
    """What everybody says where nothing happens, and in `hits` what the engine had cached of each before that."""
    with thaw.open(folder, engine=engine) as repo, RequestQueue(repo, max_num_seqs=plan["max_num_seqs"]) as queue:
        parked = fill(repo, queue, plan)
        assert queue.wait(900)
        found = {f"r{i}": list(queue.request(f"r{i}").result()) for i in range(plan["num_requests"])}
        if hits is not None:
            hits |= {id: CACHED[queue.request(id)] for id in found}
        return found | {f"p{i}": wake(session, hits, f"p{i}") for i, session in enumerate(parked)}


CACHED: weakref.WeakKeyDictionary[QueuedRequest, int] = weakref.WeakKeyDictionary()
"""How many tokens the engine had cached, by its own count, when a request was last taken up."""
FINISH = QueuedRequest.finish


def finish(request: QueuedRequest, done: Completion) -> None:
    CACHED[request] = done.num_cached_tokens
    FINISH(request, done)


QueuedRequest.finish = finish  # type: ignore[assignment]


def whole(plan: dict[str, Any]) -> None:
    hits: dict[str, int] = {}
    with engine_of(plan) as engine:
        out = undisturbed(Path(plan["folder"]), plan, engine, hits)
    say(out=out, hits=hits)


LOCK = threading.Lock()


def say(**what: Any) -> None:
    with LOCK:
        print(json.dumps(what), flush=True)


Times = dict[str, list[float]]
"""When each token of a request had reached its client."""


def follow(queue: RequestQueue, seen: dict[str, list[int]], times: Times | None = None, *, aloud: bool = False) -> None:
    """Be a client of every request: what it has taken is known outside of this process."""

    def one(id: str) -> None:
        for piece in queue.request(id).stream():
            seen[id] += piece.token_ids
            if times is not None:
                times.setdefault(id, []).append(time.monotonic())
            if aloud:
                say(id=id, more=piece.token_ids)

    for id in seen:
        threading.Thread(target=one, args=[id], daemon=True).start()


def begin(plan: dict[str, Any]) -> None:
    engine = engine_of(plan, **plan["slow"])
    engine.identity()  # it hashes the weights, once a process
    repo = thaw.open(plan["folder"], engine=engine)
    queue = RequestQueue(repo, max_num_seqs=plan["max_num_seqs"])
    parked = fill(repo, queue, plan)
    seen: dict[str, list[int]] = {f"r{i}": [] for i in range(plan["num_requests"])}
    times: Times = {}
    follow(queue, seen, times)
    running = [one for one in queue.requests() if one.status == "running"]
    while len(running) < plan["max_num_seqs"] or min(len(seen[one.id]) for one in running) < plan["at"]:
        time.sleep(0.002)
        assert not any(queue.request(id).ended for id in seen), "too fast to be caught in the middle"
        running = [one for one in queue.requests() if one.status == "running"]
    cut = [time.monotonic()]
    taken = snapshot(repo, NAME, queue=queue)
    cut.append(time.monotonic())
    num = {was: len(taken.of(was)) for was in ("running", "waiting", "parked", "idle")}
    said = {"num": num, "missed": len(taken.missed), "names": [one.engine_ref for one in parked]}
    time.sleep(plan.get("after_s", 0.0))
    say(**said, **pause(cut, times))
    while True:  # until it is killed
        say(seen=seen)
        time.sleep(0.01)


def pause(cut: list[float], times: Times) -> dict[str, float]:
    """How long the cut took, and what its neighbours noticed of it: a step's median time before it, the largest gap
    between two pieces of one request before it and in it, in seconds."""
    start, end = cut
    gaps = [(a, b) for own in times.values() for a, b in itertools.pairwise(own)]
    before = [b - a for a, b in gaps if start - 4 * (end - start) <= a and b <= start]
    inside = [b - a for a, b in gaps if a < end and b > start]
    return {
        "cut_s": end - start,
        "step_s": statistics.median(before or [0.0]),
        "gap_before_s": max(before, default=0.0),
        "gap_s": max(inside, default=0.0),
    }


def bring_back(plan: dict[str, Any]) -> None:
    """Restore, and let all finish. Where the plan names their folders, do the same with a spoiled copy, and run what
    an engine says to which nothing happens."""
    began = time.monotonic()
    engine = engine_of(plan)
    booted = time.monotonic() - began
    said = {**restored(plan, engine, Path(plan["folder"]), NAME), "boot_s": booted}
    if "whole" in plan:
        hits: dict[str, int] = {}
        said |= {"whole": undisturbed(Path(plan["whole"]), plan, engine, hits), "whole_hits": hits}
    if "spoiled" in plan:
        said["spoiled"] = restored(plan, engine, Path(plan["spoiled"]), "spoiled")
    say(**said)


def restored(plan: dict[str, Any], engine: Engine, folder: Path, name: str) -> dict[str, Any]:
    """What everybody says to the end, and what the engine had cached of each."""
    repo = thaw.open(folder, engine=engine, create=False)
    back = restore(repo, name)
    out: dict[str, list[int]] = {}
    wrong: dict[str, str] = {}
    for id, seen in plan["seen"].items():
        try:
            out[id] = [*seen, *(t for piece in back.queue.request(id).stream(seen=seen) for t in piece.token_ids)]
        except ThawError as error:
            wrong[id] = f"{error.kind}: {len(back.queue.request(id).token_ids)} tokens"
    parked = [back.sessions.get(name) for name in plan["names"]]
    were = [session is not None and session.view().parked for session in parked]
    hits = {id: CACHED[back.queue.request(id)] for id in out}
    out |= {f"p{i}": wake(session, hits, f"p{i}") for i, session in enumerate(parked) if session is not None}
    back.queue.close()
    for session in back.sessions.values():
        session.close()
    return {
        "out": out, "recomputed": back.num_recomputed_tokens, "missed": len(back.missed), "parked": were,
        "prefilled": [back.queue.request(id).num_prefilled for id in plan["seen"]], "seconds": back.seconds,
        "hits": hits, "wrong": wrong,
        "held": {one.request.id: one.num_kv for one in back.snapshot.of("running") if one.request},
    }  # fmt: skip


def go_on(plan: dict[str, Any]) -> None:
    """Begin, or continue from the newest checkpoint, until it is killed. Says what each checkpoint has, and what was
    generated when it was begun."""
    repo = thaw.open(plan["folder"], engine=engine_of(plan, **plan["slow"]))
    try:
        back = restore_checkpoint(repo)
        queue, held = back.queue, list(back.sessions.values())
        had = {one.request.id: one.num_tokens - one.request.start for one in back.snapshot.sessions if one.request}
        say(restored=had, missed=len(back.missed))
    except NotFound:
        queue = RequestQueue(repo, max_num_seqs=plan["max_num_seqs"])
        held = fill(repo, queue, plan)
    seen: dict[str, list[int]] = {f"r{i}": [] for i in range(plan["num_requests"])}
    follow(queue, seen, aloud=True)
    ring = CheckpointRing(queue, tokens=plan["every"])
    write = ring._write

    def told() -> Any:
        say(begun={one.id: one.num_tokens for one in queue.requests()})
        done = write()
        after = {one.id: one.num_tokens for one in queue.requests()}
        had = {one.request.id: one.num_tokens - one.request.start for one in done.sessions if one.request}
        say(done=had, after=after)
        return done

    ring._write = told  # type: ignore[method-assign]
    while held:
        time.sleep(1.0)


if __name__ == "__main__":
    told = json.loads(Path(sys.argv[2]).read_text())
    {"whole": whole, "begin": begin, "restore": bring_back, "checkpoint": go_on}[sys.argv[1]](told)
