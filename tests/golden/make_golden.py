"""Makes the golden repository of the current format: `python tests/golden/make_golden.py FOLDER`.

Run once for each format version; the folder is checked in and never written again. Tests read a copy of it with
whatever thaw they test: old repositories stay readable. Contents: every kind of object with every optional field
used once, two branches, a tag, a reflog, a fork inside a segment, a commit with two parents, pads, equal blobs.

    format-1    no turn has messages or entropies
    format-2    prompts are `thaw.turn/2`, completions have entropies, the database has format 2
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from blake3 import blake3

from thaw.core.cache import FullKV
from thaw.core.canonical import U64
from thaw.core.identity import ModelIdentity
from thaw.core.ids import CommitId, digest
from thaw.core.objects import (
    Boundary,
    Chat,
    ChatSettings,
    ChatTurn,
    Commit,
    Segment,
    SegmentEntry,
    SegmentNode,
    State,
    Turn,
    TurnNode,
)
from thaw.core.prefix import chains, extend
from thaw.core.sampling import Sampling
from thaw.data.pack import PackItem, write_pack
from thaw.store import RefUpdate, Store, Transaction

TIME = 1_795_000_000_000_000_000
TOKENS = tuple(int.from_bytes(blake3(f"golden/{i}".encode()).digest(length=2), "little") for i in range(300))
MODEL = ModelIdentity(
    architecture="GoldenForCausalLM",
    weights=digest(b"weights"),
    config={"rope": '{"theta":10000.0}', "naïve": '"käse"'},
    dtype="bfloat16",
    tokenizer=digest(b"tokenizer"),
    adapter=None,
    policy="7",
    groups=(FullKV(name="full", first_layer=0, num_layers=1, num_kv_heads=2, head_dim=4, dtype="bfloat16"),),
)

CHAT = Chat(
    begin=0,
    messages=('{"role":"system","content":"kühl"}', '{"role":"user","content":[{"type":"text","text":"Grüße,"}]}'),
    continue_final_message=True,
    settings=ChatSettings(
        tools=('{"z":1,"a":2.5}',), variables={"enable_thinking": "false"}, moment="2026-11-29T03:04:05"
    ),
)


def kv(start: int, end: int, head: int) -> bytes:
    """[1 layer][K|V][token][4] of two bytes each."""
    return blake3(f"kv/{start}/{head}".encode()).digest(length=(end - start) * 16)


def put_kv(
    tx: Transaction, store: Store, model: str, spans: list[tuple[int, int]], hidden: bytes
) -> list[SegmentEntry]:
    shapes = [(a, b, head) for a, b in spans for head in range(2)]
    items = [
        PackItem("", "BF16", (1, 2, b - a, 4), (b - a) * 16, lambda a=a, b=b, head=head: kv(a, b, head))  # type: ignore[misc]
        for a, b, head in shapes
    ]
    items.append(PackItem("", "F32", (len(hidden) // 4,), len(hidden), lambda: hidden))
    name = tx.lease_pack()
    result = write_pack(store.packs, name, items)
    tx.add_pack(name, result.nbytes, result.blobs)
    chain, entries = chains(model, TOKENS), []
    for number, (a, b) in enumerate(spans):
        window = chain[a // 256]
        blobs = tuple(place.blob for place in result.blobs[2 * number : 2 * number + 2])
        prefix = extend(window, TOKENS[a // 256 * 256 : b])
        segment = Segment(start=a, tokens=TOKENS[a:b], window=window, prefix=prefix, blobs={"full": blobs})
        entries.append(SegmentEntry(segment=tx.put(segment), start=a, length=b - a))
    return entries


def turns(tx: Transaction) -> TurnNode:
    prompt = ChatTurn(kind="prompt", start=0, end=290, role="user", text="Grüße,\n\u2028 \U0001f9ca?", chat=CHAT)
    completion = Turn(
        kind="completion",
        start=290,
        end=292,
        text="ice",
        sampling=Sampling(temperature=0.7, top_p=0.9, stop=("\n\n",), max_tokens=8, seed=2**64 - 1, entropy=True),
        seed=U64(2**64 - 1),
        finish_reason="stop",
        stop_reason="\n\n",
        logprobs=(-0.25, -1e-07),
        top_logprobs=(((17, -0.25), (4, -3.5)), ((9, -1e-07),)),
        policy="7",
        entropies=(0.5, 2.25),
    )
    return TurnNode(entries=(tx.put(prompt), tx.put(completion)))


def commit(
    store: Store, end: int, name: str, parents: tuple[str, ...], spans: list[tuple[int, int]], kept: str | None
) -> str:
    """A session of `end` tokens, `end` - 1 with KV; with `kept` the first 200 are a part of that commit's segment."""
    with store.begin() as tx:
        model = tx.put(MODEL)
        hidden = blake3(f"hidden/{end}".encode()).digest(length=16)
        entries = [] if kept is None else [cut(store, kept)]
        entries += put_kv(tx, store, model, spans, hidden)
        boundary = Boundary(
            position=end, digest=digest(b"logits"), top=((1, -0.5), (2, -1.25)), batch=1,
            hidden=digest(hidden), hidden_dtype="F32", hidden_shape=(4,),
        )  # fmt: skip
        state = State(
            model=model, num_tokens=end, num_kv=end - 1, nodes=(tx.put(SegmentNode(entries=tuple(entries))),),
            tail_tokens=TOKENS[end - 1 : end], turn_nodes=(tx.put(turns(tx)),), num_turns=2, seed=U64(2**63 + 1),
            salt="golden", share_prefix=kept is not None, boundary=boundary,
        )  # fmt: skip
        number = len(list(store.commits()))
        value = Commit(
            state=tx.put(state), parents=parents, message=f"golden {name}\nsecond line", time_ns=U64(TIME + number),
            branch=name, meta={"git": "0123abc"}, origin={"engine": "golden", "tp": "1"},
        )  # fmt: skip
        one = CommitId(tx.put(value))
        tx.commit(RefUpdate(name, "branch", one, "any", f"commit: golden {name}"))
    return one


def cut(store: Store, identifier: str) -> SegmentEntry:
    state = store.get_as(store.get_as(identifier, Commit).state, State)
    first = store.get_as(state.nodes[0], SegmentNode).entries[0]
    return SegmentEntry(segment=first.segment, start=first.start, length=200)


def make(folder: Path) -> None:
    with Store.init(folder) as store:
        first = commit(store, 292, "main", (), [(0, 256), (256, 291)], None)
        fork = commit(store, 206, "fork", (first,), [(200, 205)], first)
        merge = commit(store, 300, "main", (first, fork), [(0, 256), (256, 299)], None)
        store.update_refs(RefUpdate("v1", "tag", CommitId(first), None, "tag"))
        store.set_setting("model", '"/models/golden"')
        store.set_head("fork")
        ids = {"first": first, "fork": fork, "merge": merge, "uuid": store.uuid}
        packs = {name: digest((store.packs / name).read_bytes()) for name in sorted(os.listdir(store.packs))}
    for lock in folder.glob("*.lock"):
        lock.unlink()
    (folder.parent / f"{folder.name}.json").write_text(json.dumps({"ids": ids, "packs": packs}, indent=1) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
