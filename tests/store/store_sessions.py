"""Small, real repositories for tests: sessions whose KV is made from their tokens."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from thaw.core.cache import FullKV
from thaw.core.canonical import U64
from thaw.core.identity import ModelIdentity
from thaw.core.ids import CommitId
from thaw.core.objects import NODE_ENTRIES, Commit, Segment, SegmentEntry, SegmentNode, State, Turn, TurnNode
from thaw.core.prefix import chains, extend, windows
from thaw.data.pack import PackItem, write_pack
from thaw.store import RefUpdate, Store, Transaction

HEADS, HEAD_DIM, LAYERS = 2, 4, 2
MODEL = ModelIdentity(
    architecture="fake",
    weights="b3:" + "0" * 64,
    config={"rope": "none"},
    dtype="float32",
    tokenizer="bytes",
    groups=(
        FullKV(
            name="full",
            first_layer=0,
            num_layers=LAYERS,
            num_kv_heads=HEADS,
            head_dim=HEAD_DIM,
            dtype="float32",
        ),
    ),
)


def kv(tokens: tuple[int, ...], start: int, end: int, head: int) -> bytes:
    """[layer][K|V][token][head_dim] float32 bytes of tokens [start, end), a hash of the whole prefix."""
    nbytes = LAYERS * 2 * (end - start) * HEAD_DIM * 4
    return blake3(repr((tokens[:end], start, head)).encode()).digest(length=nbytes)


def put_session(
    tx: Transaction, store: Store, tokens: tuple[int, ...], base: str | Sequence[SegmentEntry] | None = None
) -> State:
    """Writes the KV that `base`, a commit or its entries, has not into the transaction's pack, and all objects."""
    num_kv = len(tokens) - 1
    model = tx.put(MODEL)
    entries = stored_entries(store, base) if isinstance(base, str) else list(base or ())
    new = windows(entries[-1].start + entries[-1].length if entries else 0, num_kv)
    items = [
        PackItem("", "F32", (LAYERS, 2, b - a, HEAD_DIM), LAYERS * 2 * (b - a) * HEAD_DIM * 4,
                 lambda a=a, b=b, h=h: kv(tokens, a, b, h))
        for a, b in new for h in range(HEADS)
    ]  # fmt: skip
    if items:
        result = write_pack(store.packs, tx.pack, items)
        tx.add_pack(result.name, result.nbytes, result.blobs)
    chain = chains(model, tokens)
    for a, b in new:
        window = chain[a // 256]
        blobs = tuple("b3:" + blake3(kv(tokens, a, b, h)).hexdigest() for h in range(HEADS))
        segment = Segment(
            start=a,
            tokens=tokens[a:b],
            window=window,
            prefix=extend(window, tokens[a // 256 * 256 : b]),
            blobs={"full": blobs},
        )
        entries.append(SegmentEntry(segment=tx.put(segment), start=a, length=b - a))
    nodes = tuple(
        tx.put(SegmentNode(entries=tuple(entries[i : i + NODE_ENTRIES]))) for i in range(0, len(entries), NODE_ENTRIES)
    )
    turn = tx.put(Turn(kind="prompt", start=0, end=len(tokens), text=f"{len(tokens)} tokens"))
    state = State(
        model=model, num_tokens=len(tokens), num_kv=num_kv, nodes=nodes, tail_tokens=tokens[num_kv:],
        turn_nodes=(tx.put(TurnNode(entries=(turn,))),), num_turns=1, seed=U64(1), salt="s",
    )  # fmt: skip
    return state


def commit(
    store: Store,
    tokens: tuple[int, ...],
    *,
    branch: str | None = "main",
    parents: tuple[str, ...] = (),
    expect: object = "any",
    base: str | Sequence[SegmentEntry] | None = None,
    message: str = "m",
) -> CommitId:
    """One session committed onto a branch (None: no ref)."""
    with store.begin() as tx:
        state = tx.put(put_session(tx, store, tokens, base))
        value = Commit(state=state, parents=parents, message=message, time_ns=U64(time.time_ns()), branch=branch)
        identifier = CommitId(tx.put(value))
        refs = [] if branch is None else [RefUpdate(branch, "branch", identifier, expect, "commit")]  # type: ignore[arg-type]
        tx.commit(*refs)
    return identifier


def stored_entries(store: Store, identifier: str) -> list[SegmentEntry]:
    state = store.get_as(store.get_as(identifier, Commit).state, State)
    return [entry for node in state.nodes for entry in store.get_as(node, SegmentNode).entries]


def read_all(store: Store, identifier: str) -> int:
    """Reads a commit's whole state with all KV, verified; returns the KV's bytes."""
    from thaw.data.pack import read_blobs

    state = store.get_as(store.get_as(identifier, Commit).state, State)
    segments = [store.get_as(entry.segment, Segment) for entry in stored_entries(store, identifier)]
    blobs = [blob for segment in segments for heads in segment.blobs.values() for blob in heads]
    for turns in state.turn_nodes:
        for turn in store.get_as(turns, TurnNode).entries:
            store.get_as(turn, Turn)
    places = store.locate(blobs)
    return read_blobs(store.packs, [(places[blob], None) for blob in blobs]).nbytes


def tokens(number: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(int.from_bytes(blake3(f"{seed}/{i}".encode()).digest(length=2), "little") for i in range(number))


def folder_bytes(path: Path) -> int:
    return sum(os.stat(path / name).st_size for name in os.listdir(path))
