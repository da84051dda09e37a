"""Which weights computed a session's KV, token range by token range.

KV is of one policy unless somebody asked to keep it over a policy step (`stale_kv`). Then its ranges are written down:
in the session's view, in its proof, in what it commits. Where all KV is of the weights that run, there are none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

MAX_RANGES = 4096


class KVRange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The KV of tokens [start, end) was computed under `policy`, by these `weights` (their id; None where they were
    gone before anybody asked for it)."""

    start: int
    end: int
    policy: str
    weights: str | None

    def same_weights(self, other: KVRange) -> bool:
        """Whether both are known to be of one policy and the same weights."""
        return self.policy == other.policy and self.weights is not None and self.weights == other.weights


def cut(ranges: Sequence[KVRange], num_kv: int) -> tuple[KVRange, ...]:
    """What of `ranges` lies before token `num_kv`."""
    inside = [one for one in ranges if one.start < num_kv]
    return tuple(msgspec.structs.replace(one, end=min(one.end, num_kv)) for one in inside)


def joined(ranges: Iterable[KVRange]) -> tuple[KVRange, ...]:
    """The same, without empty ranges, and neighbours of the same weights as one."""
    out: list[KVRange] = []
    for one in ranges:
        if one.start == one.end:
            continue
        if out and out[-1].same_weights(one):
            out[-1] = msgspec.structs.replace(out[-1], end=one.end)
        else:
            out.append(one)
    return tuple(out)


def stale(ranges: Sequence[KVRange], policy: str, weights: str | None) -> tuple[KVRange, ...]:
    """`ranges` if any of them is not known to be of this policy and these weights, else ()."""
    now = KVRange(start=0, end=0, policy=policy, weights=weights)
    return tuple(ranges) if any(not one.same_weights(now) for one in ranges) else ()


def agreement(a: Sequence[KVRange], b: Sequence[KVRange]) -> int:
    """How many leading tokens are of the same weights in both."""
    end = 0
    for one, other in zip(a, b, strict=False):
        if (one.start, one.policy, one.weights) != (other.start, other.policy, other.weights):
            break
        end = min(one.end, other.end)
        if one.end != other.end:
            break
    return end


def check(ranges: Sequence[KVRange], num_kv: int) -> None:
    """Raise `ValueError` unless they cover exactly [0, num_kv), each of other weights than the one before it."""
    if not 1 <= len(ranges) <= MAX_RANGES:
        raise ValueError(f"{len(ranges)} ranges of KV; there are 1 to {MAX_RANGES}")
    end = 0
    for one in ranges:
        if one.start != end or one.end <= one.start:
            raise ValueError(f"a range of KV covers tokens [{one.start}, {one.end}); the one before it ends at {end}")
        end = one.end
    if end != num_kv:
        raise ValueError(f"the ranges of KV end at token {end}; {num_kv} tokens have KV")
    if joined(ranges) != tuple(ranges):
        raise ValueError("two neighbouring ranges of KV are of the same weights")


def text(ranges: Sequence[KVRange]) -> str:
    """`tokens 0-511 policy '1', 512-640 policy '2'`; where one policy's weights changed, with the weights' first
    digits."""
    policies = {one.policy for one in ranges}
    told = len(policies) < len({(one.policy, one.weights) for one in ranges})
    return "tokens " + ", ".join(
        f"{one.start}-{one.end - 1} policy {one.policy!r}{f' (weights {_short(one.weights)})' if told else ''}"
        for one in ranges
    )


def _short(weights: str | None) -> str:
    return "not known" if weights is None else weights[:13]
