"""A whole engine in a process of its own: it is cut, killed with all its processes, and restored in another process.

python(mode, plan, folder)      a process that works (`snapshot_worker.py`), its output lines of JSON
goes_on(plan, folder)           an undisturbed run, a cut, `kill -9`, a restore, and a restore of a spoiled copy
killed_lives(plan, …)           kills with checkpoints: what was told, and how many tokens each kill cost
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from test_checkpoints import Life
from test_engine_snapshot import python

from thaw.snapshot import EngineSnapshot, manifest
from thaw.store import Store
from thaw.testing.plans import flip_byte

LIMIT_S = 1800.0
SPOILED = "spoiled"
HELD = (
    "all 44 finished with the tokens of an undisturbed run, none was prefilled again, the engine had cached of each "
    "what it had there; two sessions with one another's KV were refused, and one with a wrong byte was named"
)
"""What `goes_on` has found."""


def said_by(mode: str, plan: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a process says in its only line, to its end."""
    process = python(mode, plan, folder)
    try:
        out, _ = process.communicate(timeout=LIMIT_S)
    except BaseException:
        kill(process)
        raise
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9, of the process and of all that it has started: the engine's own processes too."""
    pids = [process.pid, *started_by(process.pid)]
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    ends = time.monotonic() + 30.0
    while any(is_alive(pid) for pid in pids[1:]):
        assert time.monotonic() < ends, "a process of the engine is still there"
        time.sleep(0.01)


def started_by(pid: int) -> list[int]:
    """Processes that this one has started, and those that they have (Linux)."""
    parents = {int(path.name): status_of(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
    found, left = list[int](), [pid]
    while left:
        parent = left.pop()
        left += (own := [one for one, (_, of) in parents.items() if of == parent])
        found += own
    return found


def status_of(path: Path) -> tuple[str, int]:
    """(state, parent) of a process by its folder in /proc; ("", 0) where it has ended."""
    try:
        fields = (path / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[1])


def is_alive(pid: int) -> bool:
    return status_of(Path(f"/proc/{pid}"))[0] not in ("", "Z", "X")


# -- a cut, a kill, a restore


def cut_and_killed(plan: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """(what the process said of its snapshot, what clients had taken when it was killed)."""
    process = python("begin", plan, folder)
    assert process.stdout is not None
    try:
        taken, seen = json.loads(process.stdout.readline()), {}
        for _ in range(3):
            seen = json.loads(process.stdout.readline())["seen"]
    finally:
        kill(process)
    return taken, seen


def goes_on(plan: dict[str, Any], folder: Path) -> dict[str, dict[str, float]]:
    """All sessions finish with the tokens of an undisturbed run, and the engine has of each cached what that one had;
    where the KV is another session's, or a byte is wrong, just these sessions do not. Returns counts and times."""
    plan = {**plan, "folder": str(folder / "r")}
    began = time.monotonic()
    taken, seen = cut_and_killed(plan, folder)
    killed = time.monotonic()
    shutil.copytree(folder / "r", folder / SPOILED)
    victims = spoil(folder / SPOILED, taken["names"][0])
    plan |= {"seen": seen, "names": taken["names"], "spoiled": str(folder / SPOILED), "whole": str(folder / "whole")}
    said = said_by("restore", plan, folder)
    back, whole = said, {"out": said["whole"], "hits": said["whole_hits"]}
    assert len({tuple(out[:8]) for out in whole["out"].values()}) > len(whole["out"]) // 2  # or equal says nothing
    check_whole(plan, taken, back, whole)
    check_spoiled(said["spoiled"], whole["out"], victims, taken["missed"])
    return {
        "sessions": {**taken["num"], "finished": len(back["out"]), "wrong": 0, "recomputed": back["recomputed"]},
        "times": {
            "cut-s": taken["cut_s"], "step-s": taken["step_s"], "largest-gap-before-s": taken["gap_before_s"],
            "largest-gap-in-the-cut-s": taken["gap_s"], "largest-gap-in-the-cut-in-steps": steps(taken),
            "until-killed-s": killed - began, "boot-s": back["boot_s"], "restore-s": back["seconds"],
        },
        "control": {
            "states-swapped": 2, "swapped-and-refused": len(said["spoiled"]["wrong"]), "byte-changed-and-named": 1,
            "others-that-finished-right": plan["num_requests"] - 2 + plan["num_parked"] - 1,
        },
    }  # fmt: skip


def steps(taken: dict[str, Any]) -> float:
    """The largest gap between two tokens of one request during the cut, in steps of the engine."""
    return taken["gap_s"] / taken["step_s"] if taken["step_s"] else 0.0


def check_whole(plan: dict[str, Any], taken: dict[str, Any], back: dict[str, Any], whole: dict[str, Any]) -> None:
    running, parked = plan["max_num_seqs"], plan["num_parked"]
    waiting = plan["num_requests"] - running
    assert taken["num"] == {"running": running, "waiting": waiting, "parked": parked, "idle": 0}
    assert taken["missed"] == back["missed"] == back["recomputed"] == 0 and all(back["parked"])
    assert sum(bool(tokens) for tokens in plan["seen"].values()) == running
    assert back["wrong"] == {} and differences(back["out"], whole["out"]) == {}
    assert sorted(back["prefilled"])[running - 1] <= 1  # the last sampled token, which had no KV yet
    assert len(back["held"]) == running and {id: back["hits"][id] for id in back["held"]} == back["held"]
    others = whole["hits"].keys() - back["held"].keys()
    assert len(others) == waiting + parked and {id: back["hits"][id] for id in others} == {
        id: whole["hits"][id] for id in others
    }
    assert sum(whole["hits"][id] > 0 for id in others) >= parked + waiting // 2


def differences(out: dict[str, list[int]], whole: dict[str, list[int]]) -> dict[str, int]:
    """By request, the first token that differs."""
    found = {}
    for id in out.keys() | whole.keys():
        a, b = out.get(id, []), whole.get(id, [])
        if a != b:
            found[id] = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return found


# -- controls


def spoil(path: Path, parked: str) -> set[str]:
    """Beside the snapshot in a repository, another one in which two running requests have one another's state, and a
    byte of this parked session's KV is wrong. Returns the two requests."""
    with Store.open(path) as store:
        name = next(ref.name for ref in store.refs("branch") if ref.name.startswith("engine"))
        found = manifest.read(store, name)
        entries = list(found.sessions)
        i, j = (k for k, one in enumerate(entries) if one.request and one.request.id in two_alike(found))
        fields = ("commit", "prefix", "num_tokens", "num_kv")
        a, b = entries[i], entries[j]
        entries[i] = msgspec.structs.replace(a, **{field: getattr(b, field) for field in fields})
        entries[j] = msgspec.structs.replace(b, **{field: getattr(a, field) for field in fields})
        model = the(store, the(store, the(store, a.commit).state).model)
        manifest.write(store, SPOILED, model, found.record, entries, replace=False)
        damage(store, next(one.commit for one in entries if one.session == parked))
    assert a.request is not None and b.request is not None
    return {a.request.id, b.request.id}


def two_alike(found: EngineSnapshot) -> set[str]:
    """Two requests that ran, whose prompts are of one length and whose clients have something."""
    ran = [one.request for one in found.of("running") if one.request and one.request.given.num > 2]
    first = ran[0]
    second = next(one for one in ran[1:] if one.start == first.start and one.given.digest != first.given.digest)
    return {first.id, second.id}


def the(store: Store, identifier: Any) -> Any:
    """An object, of whatever kind."""
    return store.get(identifier)


def damage(store: Store, commit: str) -> None:
    """Change a byte of the first blob of a commit's KV."""
    state = the(store, the(store, commit).state)
    segment = the(store, the(store, state.nodes[0]).entries[0].segment)
    blob = segment.blobs["full"][0]
    flip_byte(store.packs, store.locate([blob])[blob])


def check_spoiled(spoiled: dict[str, Any], whole: dict[str, list[int]], victims: set[str], missed: int) -> None:
    assert set(spoiled["wrong"]) == victims
    assert all(said == "law-broken: 0 tokens" for said in spoiled["wrong"].values())  # nothing of it was given out
    assert spoiled["parked"][0] is False and spoiled["missed"] >= missed + 1
    assert differences(spoiled["out"], {id: out for id, out in whole.items() if id not in victims | {"p0"}}) == {}


# -- kills with checkpoints


def begun_in_time(one: Life, every: int, slack: int) -> None:
    """Each checkpoint is begun so many tokens after the one before it was begun, or, where those came while that one
    was still being written, right after it."""
    for first, then, after in zip(one.begun, one.begun[1:], one.after, strict=False):
        for id in first.keys() & then.keys():
            assert then[id] <= max(first[id] + every, after.get(id, 0)) + slack


def lost_tokens(one: Life, restored: dict[str, int]) -> tuple[int, int]:
    """(how many tokens of a request at most are generated again, where `restored` had so many; how many of them had
    come since the checkpoint was begun that was being written)."""
    lost = {id: len(tokens) - max(0, restored[id]) for id, tokens in one.seen.items()}
    if not lost:  # killed before any client heard of a token
        return 0, 0
    worst = max(lost, key=lambda id: lost[id])
    if len(one.begun) == len(one.done):
        return lost[worst], 0
    flying = len(one.seen[worst]) - one.begun[-1].get(worst, 0)
    return lost[worst], min(max(0, flying), lost[worst])


def life(plan: dict[str, Any], folder: Path, seconds: float) -> Life:
    """Start it, let it write a checkpoint, and kill it some time after that."""
    path = folder / "said.jsonl"
    with path.open("w") as out:
        process = python("checkpoint", plan, folder, out)
    try:
        while '"done"' not in path.read_text():
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.01)
        time.sleep(seconds)
    finally:
        kill(process)
    said = path.read_text()
    return Life(said[: said.rfind("\n") + 1].splitlines())


def killed_lives(
    plan: dict[str, Any], folder: Path, waits: Iterable[float], slack: int
) -> tuple[dict[str, list[int]], list[tuple[int, int]]]:
    """Lives of one engine, each killed so many seconds after a checkpoint. Returns what each request's clients were
    told, and `lost_tokens` of each kill but the last. No life may tell anything else than those before it."""
    before: Life | None = None
    told: dict[str, list[int]] = {}
    lost = []
    for seconds in waits:
        now = life(plan, folder, seconds)
        for id, tokens in now.seen.items():
            shared = min(len(tokens), len(told.get(id, [])))
            assert tokens[:shared] == told.get(id, [])[:shared]  # none is wrong
            told[id] = max(told.get(id, []), tokens, key=len)
        begun_in_time(now, plan["every"], slack)
        if before is not None:
            assert now.restored is not None
            assert all(now.restored[id] >= before.done[-1][id] for id in now.restored)  # nothing older was restored
            lost.append(lost_tokens(before, now.restored))
        before = now
    return told, lost
