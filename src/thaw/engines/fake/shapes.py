"""The cache groups that a fake engine can have."""

from __future__ import annotations

from thaw.core.cache import CacheGroup, FullKV, LatentKV, PointState, SlidingKV, StatePart
from thaw.core.errors import InvalidRequest
from thaw.engines.fake.backend import ONE_GROUP

WINDOW = 40
"""Of the sliding groups, in tokens."""

_FULL = FullKV(name="full", first_layer=0, num_layers=1, num_kv_heads=2, head_dim=4, dtype="uint8")
_WIDE = FullKV(name="wide", first_layer=1, num_layers=2, num_kv_heads=3, head_dim=2, dtype="uint8")
_SLIDING = SlidingKV(
    name="sliding", first_layer=1, num_layers=2, num_kv_heads=1, head_dim=4, value_dim=2, dtype="uint8", window=WINDOW,
    layers=(1, 3),
)  # fmt: skip
_STATE = PointState(
    name="state", first_layer=2, num_layers=2, layers=(2, 4),
    parts=(
        StatePart(name="conv", num_heads=1, shape=(3,), dtype="uint8"),
        StatePart(name="recurrent", num_heads=2, shape=(2, 3), dtype="uint8"),
    ),
)  # fmt: skip
_LATENT = LatentKV(name="latent", first_layer=0, num_layers=3, width=6, dtype="uint8")

SHAPES: dict[str, tuple[CacheGroup, ...]] = {
    "one": ONE_GROUP,
    "two": (_FULL, _WIDE),
    "hybrid": (_FULL, _SLIDING, _STATE),
    "states": (_FULL, _STATE),
    "latent": (_LATENT,),
}


def groups_of(shape: str) -> tuple[CacheGroup, ...]:
    if shape not in SHAPES:
        raise InvalidRequest(f"groups={shape!r}: a fake engine has one of {', '.join(SHAPES)}")
    return SHAPES[shape]
