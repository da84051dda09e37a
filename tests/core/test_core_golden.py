"""Golden values: changing one changes what stored ids, seeds or draws mean, and needs a new format version."""

from __future__ import annotations

import msgspec
import pytest

from thaw.core import canonical, objects, prefix
from thaw.core.cache import FullKV, LatentKV, PointState, SlidingKV, StatePart
from thaw.core.canonical import U64
from thaw.core.identity import ModelIdentity, compare, identity_of, tensor_leaf, weights_root
from thaw.core.ids import digest, is_id, short
from thaw.core.objects import (
    Boundary,
    Chat,
    ChatSettings,
    ChatTurn,
    Commit,
    GroupedSegment,
    Segment,
    SegmentEntry,
    SegmentNode,
    State,
    StatesAtToken,
    Turn,
    TurnNode,
)
from thaw.core.sampling import Sampling, derive, uniform

A, B, C = (digest(letter) for letter in (b"a", b"b", b"c"))
GROUP = FullKV(name="full", first_layer=0, num_layers=2, num_kv_heads=2, head_dim=4, dtype="bfloat16")
MODEL = ModelIdentity(
    architecture="Fake", weights=A, config={"rope": '{"theta":10000}'}, dtype="bfloat16", tokenizer=B, groups=(GROUP,)
)
HYBRID = identity_of(
    architecture="Fake", weights=A, config={}, dtype="bfloat16", tokenizer=B,
    groups=(
        FullKV(
            name="full", first_layer=0, num_layers=2, layers=(0, 4), num_kv_heads=2, head_dim=4, value_dim=2,
            dtype="bfloat16",
        ),
        SlidingKV(name="sliding", first_layer=1, num_layers=1, num_kv_heads=1, head_dim=4, dtype="float16", window=128),
        LatentKV(name="latent", first_layer=2, num_layers=1, width=576, dtype="bfloat16"),
        PointState(
            name="state", first_layer=3, num_layers=1,
            parts=(StatePart(name="conv", num_heads=1, shape=(3, 8), dtype="bfloat16"),),
        ),
    ),
)  # fmt: skip
TURN = Turn(
    kind="completion", start=2, end=4, role="assistant", text="h\u00e9", sampling=Sampling(temperature=0.5, seed=1),
    seed=U64(2**64 - 1), finish_reason="stop", stop_reason=7, logprobs=(-0.5, -1.25), policy="0",
)  # fmt: skip
TOLD = msgspec.structs.replace(TURN, sampling=Sampling(entropy=True), entropies=(0.25, 3.0))
OBJECTS = {
    "model": MODEL,
    "segment": Segment(start=0, tokens=(1, 2, 3), window=A, prefix=B, blobs={"full": (A, C)}),
    "model of four kinds": HYBRID,
    "segment with states": GroupedSegment(
        start=0, tokens=(1, 2, 3), window=A, prefix=B, blobs={"full": (A, C), "sliding": (B,)}, first={"sliding": 1},
        points=(StatesAtToken(token=2, blobs={"state": (C,)}), StatesAtToken(token=3, blobs={"state": (A,)})),
    ),
    "segments": SegmentNode(entries=(SegmentEntry(segment=A, start=0, length=3),)),
    "turn": TURN,
    "turn with entropies": TOLD,
    "turns": TurnNode(entries=(A, B)),
    "chat turn": ChatTurn(
        kind="prompt", start=2, end=4, role="user",
        chat=Chat(
            begin=0, messages=('{"role":"user","content":"hé"}',),
            settings=ChatSettings(tools=('{"b":1,"a":2}',), variables={"x": "1.5"}, moment="2026-11-29T03:04:05"),
        ),
    ),
    "state": State(
        model=A, num_tokens=4, num_kv=3, nodes=(B,), tail_tokens=(9,), turn_nodes=(C,), num_turns=2, seed=U64(5),
        salt="s", boundary=Boundary(position=3, digest=A, top=((1, -0.5),), batch=1),
    ),
    "commit": Commit(state=A, parents=(B,), message="m", time_ns=U64(1), branch="main", meta={"k": "v"}),
}  # fmt: skip
GOLDEN = {
    "model": "b3:fda4af02693458dc857c191e09c362e991fd46971e66da5d0054953bf3c9acf8",
    "segment": "b3:68b4c0d2c4be48992d06597fb226dd41c29aa111c2cb968b664eb6b2ef11262d",
    "model of four kinds": "b3:4cb8220615bd77b4a8da91a71624f6f19266ae3695f0a37a75f0c078af536d8d",
    "segment with states": "b3:327a004b357edadd69caf5fb62705421cb654c0ce6889c37e2080dc3c33ba5a7",
    "segments": "b3:f8ee716a23993c1d3be505a9eb57cb40f9b3ae0e6be0ddc278799cc3d6261164",
    "turn": "b3:352faf502b8f473096c7eeaeaac5f9f655db494fdcdd9ae41b7d02cc9f0194b2",
    "turn with entropies": "b3:90fa7c367785648754f3fd16d6db0494a215fd859c5b99d064d7291afcb8d7f0",
    "turns": "b3:aab06b70904ff5dfeaa703af76da2b49a51845d8afedba880338304cd09df871",
    "chat turn": "b3:a8bda24bc4d3cb3337ec8956c6696699e78a3c120d8c4afcf91cfcd8eebf57bf",
    "state": "b3:c8b78b1be145bcad48d5ccc1b24737931fe72d1e9fa041bf900f3f0e00d84769",
    "commit": "b3:0d8e2234e51079b80de17991e3d54c29c93c173063aa6277055625cfaf9566b6",
}


@pytest.mark.parametrize("name", OBJECTS)
def test_object_ids_are_as_they_were(name: str) -> None:
    identifier, data = objects.encode(OBJECTS[name])
    assert identifier == GOLDEN[name]
    assert objects.decode(data, identifier) == OBJECTS[name]


def test_digests_carry_their_algorithm() -> None:
    assert digest(b"") == "b3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert digest(bytearray(b"a")) == digest(memoryview(b"a")) == A
    assert is_id(A) and not is_id(A.upper()) and not is_id(A + "\n") and not is_id(A[:-1])
    assert short(A) == A[3:13]


def test_draws_are_as_they_were() -> None:
    assert [uniform(s, p).hex() for s, p in ((0, 0), (1, 0), (0, 1), (2**64 - 1, 2**24))] == [
        "0x1.811c076bd5142p-2",
        "0x1.0c0d28ebb47c8p-4",
        "0x1.50aa66c3a2d04p-2",
        "0x1.600df524a73fdp-1",
    ]
    assert [derive(*x) for x in ((0, 0, 0), (1, 2, 3), (2**64 - 1, 2**24, 63))] == [
        10627480800743734523,
        2979012256117528411,
        9559745614177868634,
    ]


def test_draws_are_uniform_and_of_53_bits() -> None:
    draws = [uniform(9, position) for position in range(4000)]
    assert all(0.0 <= x < 1.0 for x in draws) and len(set(draws)) == 4000
    counts = [sum(int(x * 10) == i for x in draws) for i in range(10)]
    assert min(counts) > 320 and max(counts) < 480
    assert any(int(x * 2**53) % 2 for x in draws)


def test_seeds_of_children_are_apart() -> None:
    seeds = {derive(seed, position, index) for seed in range(8) for position in range(8) for index in range(64)}
    assert len(seeds) == 8 * 8 * 64


def test_prefix_hashes_are_as_they_were() -> None:
    tokens = list(range(700))
    chain = prefix.chains(A, tokens)
    assert len(chain) == 3 and chain[0] == prefix.root(A)
    assert chain == [
        "b3:f627a3ab1ce3d90a453ac5d56b0c7809f5ec19d6d5a6656429e61f0452844a42",
        "b3:5baa9a943565f34f2215f9ec3374f5f985c1640716267c653466f4443cc9b579",
        "b3:f1005c4a9e321290f5fadf4bed5bd6b19c9b822927d5bf6b9183e6ec5c587359",
    ]
    assert prefix.extend(chain[2], tokens[512:]) == (
        "b3:ab06f27a75bbb4c6c1393bb8042880f3c379c0dd475029bbe479b4af88b7df31"
    )


def test_a_prefix_hash_says_model_tokens_and_order() -> None:
    tokens = list(range(256))
    hashes = {
        prefix.chains(A, tokens)[1],
        prefix.chains(B, tokens)[1],
        prefix.chains(A, tokens[::-1])[1],
        prefix.chains(A, [*tokens[:-1], 0])[1],
        prefix.extend(prefix.root(A), tokens[:-1]),
    }
    assert len(hashes) == 5


def test_windows_cut_at_multiples_of_256() -> None:
    assert prefix.windows(0, 0) == []
    assert prefix.windows(0, 256) == [(0, 256)]
    assert prefix.windows(100, 600) == [(100, 256), (256, 512), (512, 600)]
    assert prefix.windows(256, 257) == [(256, 257)]


def test_weights_do_not_depend_on_order_and_do_on_every_part() -> None:
    one, two = tensor_leaf("a", "F32", (2,), b"12345678"), tensor_leaf("b", "F32", (1,), b"1234")
    root = "b3:1f810b6da2ad95cad67028dfb654ca68ebc41105138720174e6d726a27b6f32a"
    assert weights_root({"a": one, "b": two}) == weights_root({"b": two, "a": one}) == root
    changed = [
        tensor_leaf("c", "F32", (2,), b"12345678"),
        tensor_leaf("a", "I32", (2,), b"12345678"),
        tensor_leaf("a", "F32", (1, 2), b"12345678"),
        tensor_leaf("a", "F32", (2,), b"12345679"),
    ]
    assert len({one, *changed}) == 5


def test_an_identity_equals_itself() -> None:
    compare(MODEL, MODEL)


def test_canonical_json_is_rfc_8785() -> None:
    assert canonical.encode(TURN).startswith(
        b'{"end":4,"finish_reason":"stop","kind":"completion","logprobs":[-0.5,-1.25]'
    )
    assert '"text":"h\u00e9"'.encode() in canonical.encode(TURN)
    assert b'"seed":"18446744073709551615"' in canonical.encode(TURN), "64-bit integers are strings"
