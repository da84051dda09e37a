"""A process that works on an engine until it is killed, or that restores what another one left. Says what it has given
out as lines of JSON. Run with a plan: `python snapshot_worker.py begin|restore|checkpoint PLAN.json`."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import thaw
from thaw import Sampling
from thaw.core.errors import NotFound
from thaw.engines.base import Engine
from thaw.repo import Repository, Session
from thaw.snapshot import CheckpointRing, RequestQueue, restore, restore_checkpoint, snapshot

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


def wake(session: Session) -> list[int]:
    return list(session.generate("Go. ", Sampling(max_tokens=8, ignore_eos=True)).token_ids)


def undisturbed(folder: Path, plan: dict[str, Any], engine: Engine) -> dict[str, list[int]]:
    """What everybody says where nothing happens; alone, so that no batch shape differs."""
    with thaw.open(folder, engine=engine) as repo, RequestQueue(repo, max_num_seqs=plan["max_num_seqs"]) as queue:
        parked = fill(repo, queue, plan)
        assert queue.wait(300)
        found = {f"r{i}": list(queue.request(f"r{i}").result()) for i in range(plan["num_requests"])}
        return found | {f"p{i}": wake(session) for i, session in enumerate(parked)}


LOCK = threading.Lock()


def say(**what: Any) -> None:
    with LOCK:
        print(json.dumps(what), flush=True)


def follow(queue: RequestQueue, seen: dict[str, list[int]], *, aloud: bool = False) -> None:
    """Be a client of every request: what it has taken is known outside of this process."""

    def one(id: str) -> None:
        for piece in queue.request(id).stream():
            seen[id] += piece.token_ids
            if aloud:
                say(id=id, more=piece.token_ids)

    for id in seen:
        threading.Thread(target=one, args=[id], daemon=True).start()


def begin(plan: dict[str, Any]) -> None:
    engine = engine_of(plan, **plan["slow"])
    repo = thaw.open(plan["folder"], engine=engine)
    queue = RequestQueue(repo, max_num_seqs=plan["max_num_seqs"])
    parked = fill(repo, queue, plan)
    seen: dict[str, list[int]] = {f"r{i}": [] for i in range(plan["num_requests"])}
    follow(queue, seen)
    running = [one for one in queue.requests() if one.status == "running"]
    while len(running) < plan["max_num_seqs"] or min(len(seen[one.id]) for one in running) < plan["at"]:
        time.sleep(0.002)
        assert not any(queue.request(id).ended for id in seen), "too fast to be caught in the middle"
        running = [one for one in queue.requests() if one.status == "running"]
    taken = snapshot(repo, NAME, queue=queue)
    num = {was: len(taken.of(was)) for was in ("running", "waiting", "parked", "idle")}
    say(num=num, missed=len(taken.missed), names=[one.engine_ref for one in parked])
    while True:  # until it is killed
        say(seen=seen)
        time.sleep(0.01)


def bring_back(plan: dict[str, Any]) -> None:
    repo = thaw.open(plan["folder"], engine=engine_of(plan), create=False)
    back = restore(repo, NAME)
    out: dict[str, list[int]] = {}
    for id, seen in plan["seen"].items():
        out[id] = [*seen, *(token for piece in back.queue.request(id).stream(seen=seen) for token in piece.token_ids)]
    parked = [back.sessions[name] for name in plan["names"]]
    were = [session.view().parked for session in parked]
    out |= {f"p{i}": wake(session) for i, session in enumerate(parked)}
    prefilled = [back.queue.request(id).num_prefilled for id in plan["seen"]]
    say(out=out, recomputed=back.num_recomputed_tokens, missed=len(back.missed), parked=were, prefilled=prefilled,
        seconds=back.seconds)  # fmt: skip


def go_on(plan: dict[str, Any]) -> None:
    """Begin, or continue from the newest checkpoint, until it is killed. Says what each checkpoint has, and what was
    generated when it was begun."""
    repo = thaw.open(plan["folder"], engine=engine_of(plan, **plan["slow"]))
    try:
        back = restore_checkpoint(repo)
        queue, held = back.queue, list(back.sessions.values())
        say(restored={one.id: one.num_tokens for one in queue.known()}, missed=len(back.missed))
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
    {"begin": begin, "restore": bring_back, "checkpoint": go_on}[sys.argv[1]](told)
