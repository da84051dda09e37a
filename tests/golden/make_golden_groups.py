"""Makes the golden repository of cache groups: `python tests/golden/make_golden_groups.py FOLDER`.

Run once; the folder is checked in and never written again. Its model has a group of each kind (a full one whose V is
narrower than its K, of layers that are no neighbours), so it is a `thaw.model/2`, its segments are `thaw.segment/2`:
blobs that begin inside a segment, states at tokens inside one and at ends, a fork at a state inside a segment.

    main    292 tokens, 291 with KV; states after 200, 290 and 291; windows before each of them
    fork    206 tokens: the first 200 of main's, then 5 of its own with states after 204 and 205
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from blake3 import blake3
from make_golden import TIME, TOKENS

from thaw.core.cache import CacheGroup, FullKV, LatentKV, PointState, SlidingKV, StatePart, point_groups, token_groups
from thaw.core.canonical import U64
from thaw.core.identity import identity_of
from thaw.core.ids import CommitId, digest
from thaw.core.objects import (
    Commit,
    Segment,
    SegmentEntry,
    SegmentNode,
    State,
    StatesAtToken,
    Turn,
    TurnNode,
    with_points,
)
from thaw.core.prefix import chains, extend
from thaw.core.sampling import Sampling
from thaw.data.pack import PackItem, write_pack
from thaw.engines.embedded.transfer import SAFETENSORS
from thaw.store import RefUpdate, Store, Transaction

GROUPS: tuple[CacheGroup, ...] = (
    FullKV(
        name="full", first_layer=0, num_layers=2, layers=(0, 4), num_kv_heads=2, head_dim=4, value_dim=2,
        dtype="bfloat16",
    ),
    SlidingKV(name="sliding", first_layer=1, num_layers=1, num_kv_heads=1, head_dim=2, dtype="float16", window=30),
    LatentKV(name="latent", first_layer=2, num_layers=1, width=6, dtype="bfloat16"),
    PointState(
        name="state", first_layer=3, num_layers=1,
        parts=(
            StatePart(name="conv", num_heads=1, shape=(3, 4), dtype="bfloat16"),
            StatePart(name="recurrent", num_heads=2, shape=(2, 2), dtype="float32"),
        ),
    ),
)  # fmt: skip
MODEL = identity_of(
    architecture="GoldenHybridForCausalLM", weights=digest(b"weights"), config={"theta": "10000.0"}, dtype="bfloat16",
    tokenizer=digest(b"tokenizer"), groups=GROUPS,
)  # fmt: skip


def data(*what: object, nbytes: int) -> bytes:
    return blake3("/".join(map(str, what)).encode()).digest(length=nbytes)


def item(dtype: str, shape: tuple[int, ...], blob: bytes) -> PackItem:
    return PackItem("", SAFETENSORS[dtype], shape, len(blob), lambda: blob)


def put_segment(tx: Transaction, store: Store, model: str, start: int, end: int, first: int, points: list[int]) -> str:
    """Tokens [start, end), the sliding group from `first` on, states after `points`."""
    items, named, states = [], {}, []
    for group in token_groups(GROUPS):
        count = end - (first if group.name == "sliding" else start)
        nbytes = group.token_nbytes_per_blob * count
        blobs = [data("kv", group.name, start, i, nbytes=nbytes) for i in range(group.num_blobs)]
        items += [item(group.dtype, group.blob_shape(count), blob) for blob in blobs]
        named[group.name] = tuple(map(digest, blobs))
    for token in points:
        for state in point_groups(GROUPS):
            blobs = [data("state", token, i, nbytes=nbytes) for i, (_, nbytes) in enumerate(state.blobs)]
            kinds = [(part.dtype, (state.num_layers, *part.shape)) for part, _ in state.blobs]
            items += [item(dtype, shape, blob) for (dtype, shape), blob in zip(kinds, blobs, strict=True)]
            states.append(StatesAtToken(token=token, blobs={state.name: tuple(map(digest, blobs))}))
    name = tx.lease_pack()
    result = write_pack(store.packs, name, items)
    tx.add_pack(name, result.nbytes, result.blobs)
    chain = chains(model, TOKENS)[start // 256]
    prefix = extend(chain, TOKENS[start // 256 * 256 : end])
    plain = Segment(start=start, tokens=TOKENS[start:end], window=chain, prefix=prefix, blobs=named)
    return tx.put(with_points(plain, {"sliding": first} if first > start else {}, tuple(states)))


def turns(tx: Transaction, end: int) -> TurnNode:
    """A prompt, and a completion of two tokens that was captured in the middle."""
    prompt = Turn(kind="prompt", start=0, end=end - 2, text="Grüße")
    completion = Turn(
        kind="completion", start=end - 2, end=end, sampling=Sampling(max_tokens=8), seed=U64(2**64 - 1),
        logprobs=(-0.5, -0.25),
    )  # fmt: skip
    return TurnNode(entries=(tx.put(prompt), tx.put(completion)))


Own = tuple[int, int, int, list[int]]
"""start, end, first, points: of a segment."""


def commit(store: Store, end: int, name: str, parents: tuple[str, ...], own: list[Own], kept: str | None) -> str:
    """A session of `end` tokens, all but one with KV; with `kept` the first 200 are a part of that segment."""
    with store.begin() as tx:
        model = tx.put(MODEL)
        listed = [] if kept is None else [SegmentEntry(segment=kept, start=0, length=200)]
        for a, b, first, points in own:
            segment = put_segment(tx, store, model, a, b, first, points)
            listed.append(SegmentEntry(segment=segment, start=a, length=b - a))
        state = State(
            model=model, num_tokens=end, num_kv=end - 1, nodes=(tx.put(SegmentNode(entries=tuple(listed))),),
            tail_tokens=TOKENS[end - 1 : end], turn_nodes=(tx.put(turns(tx, end)),), num_turns=2, seed=U64(7),
            salt="golden",
        )  # fmt: skip
        value = Commit(
            state=tx.put(state), parents=parents, message=f"golden {name}", branch=name,
            time_ns=U64(TIME + len(list(store.commits()))),
        )  # fmt: skip
        one = CommitId(tx.put(value))
        tx.commit(RefUpdate(name, "branch", one, "any", f"commit: golden {name}"))
    return one


def make(folder: Path) -> None:
    with Store.init(folder) as store:
        main = commit(store, 292, "main", (), [(0, 256, 171, [200]), (256, 291, 261, [290, 291])], None)
        state = store.get_as(store.get_as(main, Commit).state, State)
        first = store.get_as(state.nodes[0], SegmentNode).entries[0].segment
        fork = commit(store, 206, "fork", (main,), [(200, 205, 200, [204, 205])], first)
        ids = {"main": main, "fork": fork, "uuid": store.uuid}
        packs = {name: digest((store.packs / name).read_bytes()) for name in sorted(os.listdir(store.packs))}
    for lock in folder.glob("*.lock"):
        lock.unlink()
    (folder.parent / f"{folder.name}.json").write_text(json.dumps({"ids": ids, "packs": packs}, indent=1) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
