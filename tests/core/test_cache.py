"""The kinds of cache groups: what each says of its blobs, of the tokens that it needs, of its ranks."""

from __future__ import annotations

import json
from math import prod

import msgspec
import pytest
from test_core_golden import HYBRID, MODEL

from thaw.core import cache, canonical, objects
from thaw.core.cache import CacheGroup, Column, FullKV, LatentKV, PointState, SlidingKV, StatePart
from thaw.core.errors import CorruptBlob, IdentityMismatch
from thaw.core.identity import GroupedIdentity, ModelIdentity, compare, identity_of
from thaw.core.ids import digest

FULL, SLIDING, LATENT, STATE = HYBRID.groups


def test_a_blob_is_its_planes() -> None:
    assert isinstance(FULL, FullKV) and FULL.planes == (8, 4, 8, 4) and FULL.token_nbytes_per_blob == 24
    assert FULL.token_nbytes == 48 and FULL.num_blobs == 2
    assert isinstance(LATENT, LatentKV) and LATENT.planes == (1152,) and LATENT.token_nbytes == 1152
    for group in cache.token_groups(HYBRID.groups):
        assert sum(group.planes) == group.token_nbytes_per_blob
        size = cache.DTYPE_BYTES[group.dtype]
        assert prod(group.blob_shape(7)) * size == 7 * group.token_nbytes_per_blob
    assert isinstance(STATE, PointState) and [n for _, n in STATE.blobs] == [48] and STATE.nbytes == 48


def test_columns_are_all_blobs_in_order() -> None:
    assert cache.columns(HYBRID.groups) == (
        Column(FULL, 0), Column(FULL, 1), Column(SLIDING, 0), Column(LATENT, 0),  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("num_kv", [0, 1, 126, 127, 128, 129, 5000])
def test_a_token_attends_to_its_window_itself_among_it(num_kv: int) -> None:
    """The next token stands at `num_kv`: with what is covered there are `window` of them, or all there are."""
    assert isinstance(SLIDING, SlidingKV) and isinstance(FULL, FullKV)
    covered = SLIDING.covers(num_kv)
    assert covered.stop == num_kv and len(covered) + 1 == min(num_kv + 1, SLIDING.window)
    assert FULL.covers(num_kv) == range(num_kv)
    windowed = LatentKV(name="l", first_layer=0, num_layers=1, width=8, dtype="uint8", window=128)
    assert windowed.covers(num_kv) == covered
    needed = cache.nbytes_at(HYBRID.groups, num_kv)
    assert needed == num_kv * (48 + 1152) + len(covered) * 16 + (48 if num_kv else 0)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_ranks_share_heads_and_hold_every_one(num_ranks: int) -> None:
    full = FullKV(name="full", first_layer=0, num_layers=1, num_kv_heads=4, head_dim=2, dtype="uint8")
    shares = [full.share(rank, num_ranks) for rank in range(num_ranks)]
    assert {head for share in shares for head in share} == set(range(4))
    assert {len(share) for share in shares} == {max(1, 4 // num_ranks)}
    state = PointState(
        name="state", first_layer=0, num_layers=1,
        parts=(
            StatePart(name="conv", num_heads=8, shape=(3,), dtype="uint8"),
            StatePart(name="recurrent", num_heads=16, shape=(2,), dtype="float32"),
        ),
    )  # fmt: skip
    parts = [state.share(rank, num_ranks) for rank in range(num_ranks)]
    assert [blob for part in (0, 1) for share in parts for blob in share[part]] == list(range(24))
    assert (
        isinstance(LATENT, LatentKV)
        and [LATENT.share(rank, num_ranks) for rank in range(num_ranks)] == [range(1)] * num_ranks
    )


def test_plain_full_groups_alone_are_format_1() -> None:
    plain = MODEL.groups[0]
    assert type(MODEL) is ModelIdentity and type(HYBRID) is GroupedIdentity
    fields = {name: getattr(MODEL, name) for name in ModelIdentity.__struct_fields__}
    two = msgspec.structs.replace(plain, name="other", head_dim=8)
    assert type(identity_of(**{**fields, "groups": (plain, two)})) is ModelIdentity
    for group in HYBRID.groups:
        assert type(identity_of(**{**fields, "groups": (group,)})) is GroupedIdentity
    for kind, groups in ((ModelIdentity, HYBRID.groups), (GroupedIdentity, MODEL.groups)):
        with pytest.raises(ValueError, match=r"thaw\.model/1"):
            kind(**{**fields, "groups": groups})
    assert "layers" not in json.loads(objects.encode(MODEL)[1])["groups"][0]


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        (FULL, "layers", [0, 1]),
        (FULL, "layers", [4, 0]),
        (FULL, "layers", [1, 4]),
        (FULL, "layers", [0, 4, 8]),
        (FULL, "value_dim", 4),
        (FULL, "name", "sliding"),
        (SLIDING, "window", 1),
        (LATENT, "width", 0),
        (STATE, "parts", []),
        (STATE, "kind", "full"),
        (STATE, "window", 4),
    ],
)
def test_a_group_that_says_what_it_need_not_or_cannot_be_is_no_object(
    group: CacheGroup, field: str, value: object
) -> None:
    fields = json.loads(objects.encode(HYBRID)[1])
    fields["groups"][HYBRID.groups.index(group)][field] = value
    data = canonical.encode(fields)
    with pytest.raises(CorruptBlob):
        objects.decode(data, digest(data))


@pytest.mark.parametrize(
    "changes",
    [
        {"first": {}, "points": []},
        {"first": {"sliding": 0}},
        {"first": {"sliding": 3}},
        {"first": {"other": 1}},
        {"points": [{"token": 0, "blobs": {}}]},
        {"points": [{"token": 4, "blobs": {}}]},
        {"points": [{"token": 3, "blobs": {}}, {"token": 2, "blobs": {}}]},
    ],
)
def test_a_segment_whose_windows_and_states_lie_outside_is_no_object(changes: dict[str, object]) -> None:
    from test_core_golden import OBJECTS

    fields = {**json.loads(objects.encode(OBJECTS["segment with states"])[1]), **changes}
    data = canonical.encode(fields)
    with pytest.raises(CorruptBlob):
        objects.decode(data, digest(data))


def test_a_refusal_names_the_groups_of_both() -> None:
    other = msgspec.structs.replace(HYBRID, groups=(*HYBRID.groups[:-1],))
    with pytest.raises(IdentityMismatch, match="cache layout") as refusal:
        compare(HYBRID, other)
    for word in ("layers 0,4", "(V 2)", "window 128", "latent of 576", "state of conv 1"):
        assert word in str(refusal.value)
