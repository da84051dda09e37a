"""What push and fetch cost against the store's own client doing no more than moving the bytes.

    python benchmarks/remote.py URL FOLDER [MEGABYTES] [ROUNDS] [KEY=VALUE …]      # options of the remote, as with -o

Arms, alternating, a prefix of its own for each round:

    push    thaw: packs made, hashed, sent; manifests; the ref moved
    put     the same packs, read from files, hashed, and put by the client, as many at a time as push does
    fetch   thaw: manifests, objects followed, KV read, hashed, written, synced, indexed
    get     the packs read by the client in ranges of 8 MiB, 16 at a time; hashed, written to files and synced

Prints every round, and push / put and fetch / get of its medians: shares of 1 would be free of charge.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

from thaw.core.cache import FullKV
from thaw.core.canonical import U64
from thaw.core.identity import ModelIdentity
from thaw.core.objects import Commit, Segment, SegmentEntry, SegmentNode, State, Turn, TurnNode
from thaw.core.prefix import chains, extend
from thaw.data.pack import PackItem, write_pack
from thaw.remote.address import open_bucket, parse
from thaw.remote.bucket import Bucket
from thaw.remote.fetch import fetch
from thaw.remote.opened import over
from thaw.remote.push import UPLOADS, PushWish, push
from thaw.store import RefUpdate, Store

LAYERS, TOKENS, WIDTH = 8, 256, 512
BLOB = LAYERS * 2 * TOKENS * WIDTH * 2
RUN, READERS = 8 << 20, 16


def make_store(path: Path, megabytes: int) -> tuple[Store, str]:
    """A repository with one commit of that much KV of random bytes, in blobs of 4 MiB."""
    store, num = Store.init(path), megabytes * (1 << 20) // BLOB
    group = FullKV(name="full", first_layer=0, num_layers=LAYERS, num_kv_heads=1, head_dim=WIDTH, dtype="bfloat16")
    identity = ModelIdentity(
        architecture="bench", weights="b3:" + "0" * 64, config={}, dtype="bfloat16", tokenizer="none", groups=(group,)
    )
    tokens = tuple(i % 50_000 for i in range(num * TOKENS + 1))
    with store.begin() as tx:
        model = tx.put(identity)
        shape = (LAYERS, 2, TOKENS, WIDTH)
        written = write_pack(
            store.packs, tx.pack, [PackItem("", "BF16", shape, BLOB, lambda: os.urandom(BLOB)) for _ in range(num)]
        )
        tx.add_pack(written.name, written.nbytes, written.blobs)
        entries = []
        for i, (window, place) in enumerate(zip(chains(model, tokens), written.blobs, strict=False)):
            own = tokens[i * TOKENS : (i + 1) * TOKENS]
            segment = Segment(
                start=i * TOKENS, tokens=own, window=window, prefix=extend(window, own), blobs={"full": (place.blob,)}
            )
            entries.append(SegmentEntry(segment=tx.put(segment), start=i * TOKENS, length=TOKENS))
        nodes = tuple(tx.put(SegmentNode(entries=tuple(entries[i : i + 64]))) for i in range(0, len(entries), 64))
        turn = tx.put(Turn(kind="prompt", start=0, end=len(tokens), text=""))
        state = State(
            model=model, num_tokens=len(tokens), num_kv=len(tokens) - 1, nodes=nodes, tail_tokens=tokens[-1:],
            turn_nodes=(tx.put(TurnNode(entries=(turn,))),), num_turns=1, seed=U64(1), salt="",
        )  # fmt: skip
        commit = tx.put(Commit(state=tx.put(state), parents=(), message="", time_ns=U64(1), branch="main"))
        tx.commit(RefUpdate("main", "branch", commit, None, "commit"))  # type: ignore[arg-type]
    return store, commit


def put(bucket: Bucket, files: list[Path]) -> None:
    def one(path: Path) -> None:
        data = path.read_bytes()
        blake3(data).digest()
        bucket.put(f"raw/{path.name}", data)

    with ThreadPoolExecutor(UPLOADS) as pool:
        list(pool.map(one, files))


def get(bucket: Bucket, files: list[Path], folder: Path) -> None:
    folder.mkdir()
    with ThreadPoolExecutor(READERS) as pool:
        for path in files:
            nbytes, key = path.stat().st_size, f"raw/{path.name}"
            ranges = [(at, min(RUN, nbytes - at)) for at in range(0, nbytes, RUN)]
            with open(folder / path.name, "wb") as out:
                for data in pool.map(lambda one: bucket.read_ranges(key, [one])[0], ranges):  # noqa: B023
                    blake3(data).digest()
                    out.write(data)
                out.flush()
                os.fsync(out.fileno())


def one_round(
    url: str, options: dict[str, str | int | bool], base: Path, store: Store, commit: str
) -> dict[str, float]:
    """Seconds of each arm. The packs of the raw arms are those that push made."""
    bucket, there, seconds = open_bucket(parse(url, options)), Store.init(base / "there"), dict[str, float]()
    began = time.perf_counter()
    push(store, over("bench", url, bucket, ""), [PushWish("branch", "main", commit)])
    seconds["push"] = time.perf_counter() - began
    began = time.perf_counter()
    fetch(there, over("bench", url, bucket, ""))
    seconds["fetch"] = time.perf_counter() - began
    there.close()
    files = []
    for entry in bucket.entries("default/packs"):
        files.append(base / entry.key.rpartition("/")[2])
        files[-1].write_bytes(bucket.read_ranges(entry.key, [(0, entry.size)])[0])
    began = time.perf_counter()
    put(bucket, files)
    seconds["put"] = time.perf_counter() - began
    began = time.perf_counter()
    get(bucket, files, base / "raw")
    seconds["get"] = time.perf_counter() - began
    return seconds


def main(url: str, folder: Path, megabytes: int = 512, rounds: int = 3, **options: str | int | bool) -> None:
    folder.mkdir(parents=True)
    store, commit = make_store(folder / "here", megabytes)
    done = []
    for number in range(rounds):
        base = folder / f"round{number}"
        base.mkdir()
        done.append(one_round(f"{url}/{os.urandom(4).hex()}", options, base, store, commit))
        print(json.dumps(done[-1]), flush=True)
    median = {arm: statistics.median(one[arm] for one in done) for arm in done[0]}
    shares = {"push": median["put"] / median["push"], "fetch": median["get"] / median["fetch"]}
    print(json.dumps({"megabytes": megabytes, "median_s": median, "share_of_raw": shares}, indent=1))


if __name__ == "__main__":
    plain = [word for word in sys.argv[1:] if "=" not in word]
    given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    typed = {key: {"true": True, "false": False}.get(value, value) for key, value in given.items()}
    main(plain[0], Path(plain[1]), *map(int, plain[2:]), **typed)
