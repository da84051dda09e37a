"""Ranges of KV by the weights that computed them, and the state that says so."""

from __future__ import annotations

import msgspec
import pytest

from thaw.core import canonical, kv_ranges
from thaw.core.canonical import U64
from thaw.core.errors import CorruptBlob, NewerFormat
from thaw.core.kv_ranges import KVRange
from thaw.core.objects import StaleState, State, decode, encode, with_ranges

A, B = "b3:" + "a" * 64, "b3:" + "b" * 64


def of(*parts: tuple[int, str, str | None]) -> tuple[KVRange, ...]:
    """(end, policy, weights) each."""
    starts = [0, *(end for end, _, _ in parts)]
    return tuple(
        KVRange(start=start, end=end, policy=policy, weights=weights)
        for start, (end, policy, weights) in zip(starts, parts, strict=False)
    )


STATE = State(
    model=A, num_tokens=10, num_kv=9, nodes=(), tail_tokens=(7,), turn_nodes=(), num_turns=0, seed=U64(1), salt="s",
)  # fmt: skip
RANGES = of((4, "0", A), (9, "1", B))


def test_a_cut_keeps_what_lies_before_it() -> None:
    assert kv_ranges.cut(RANGES, 9) == RANGES
    assert kv_ranges.cut(RANGES, 5) == of((4, "0", A), (5, "1", B))
    assert kv_ranges.cut(RANGES, 4) == of((4, "0", A))
    assert kv_ranges.cut(RANGES, 0) == ()


def test_neighbours_of_the_same_weights_are_one_and_unknown_weights_are_never_the_same() -> None:
    assert kv_ranges.joined(of((4, "0", A), (4, "1", B), (9, "0", A))) == of((9, "0", A))
    apart = of((4, "0", None), (9, "0", None))
    assert kv_ranges.joined(apart) == apart


@pytest.mark.parametrize(
    ("ranges", "is_stale"),
    [
        (of((9, "0", A)), False),
        (of((9, "1", A)), True),  # the policy's name alone
        (of((9, "0", B)), True),  # the weights alone
        (of((9, "0", None)), True),
        (RANGES, True),
    ],
)
def test_kv_is_stale_unless_all_of_it_is_known_to_be_of_what_runs(ranges: tuple[KVRange, ...], is_stale: bool) -> None:
    assert kv_ranges.stale(ranges, "0", A) == (ranges if is_stale else ())


def test_agreement_ends_at_the_first_token_of_other_weights() -> None:
    assert kv_ranges.agreement(RANGES, RANGES) == 9
    assert kv_ranges.agreement(RANGES, of((4, "0", A), (7, "1", B), (9, "2", B))) == 7
    assert kv_ranges.agreement(RANGES, of((3, "0", A), (9, "1", B))) == 3  # token 3 was computed again
    assert kv_ranges.agreement(RANGES, of((9, "0", B))) == 0
    assert kv_ranges.agreement((), RANGES) == 0


def test_the_text_names_weights_only_where_a_policy_had_several() -> None:
    assert kv_ranges.text(RANGES) == "tokens 0-3 policy '0', 4-8 policy '1'"
    text = kv_ranges.text(of((4, "0", A), (9, "0", None)))
    assert text == "tokens 0-3 policy '0' (weights b3:aaaaaaaaaa), 4-8 policy '0' (weights not known)"


def test_a_state_says_whose_kv_it_has_only_where_it_is_not_its_models_alone() -> None:
    assert with_ranges(STATE, ()) is STATE and STATE.ranges == ()
    stale = with_ranges(STATE, RANGES)
    identifier, data = encode(stale)
    assert b'"type":"thaw.state/2"' in data and b'"kv_ranges":[{"end":4,' in data
    again = decode(data, identifier)
    assert isinstance(again, StaleState) and again == stale and again.ranges == RANGES
    assert encode(STATE)[1].count(b"kv_ranges") == 0


@pytest.mark.parametrize(
    "ranges",
    [
        (),
        of((4, "0", A)),  # ends early
        of((4, "0", A), (10, "1", B)),  # ends late
        of((4, "0", A), (9, "0", A)),  # two that are one
        (RANGES[0], KVRange(start=5, end=9, policy="1", weights=B)),  # a gap
        (RANGES[0], KVRange(start=4, end=4, policy="1", weights=B), KVRange(start=4, end=9, policy="2", weights=B)),
    ],
)
def test_ranges_that_do_not_cover_the_kv_are_damage(ranges: tuple[KVRange, ...]) -> None:
    stale = with_ranges(STATE, RANGES)
    bad = canonical.encode({**canonical.to_plain(stale), "kv_ranges": msgspec.to_builtins(ranges)})
    with pytest.raises(CorruptBlob, match="range"):
        canonical.decode(bad, StaleState)


def test_a_thaw_from_before_refuses_it_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(with_ranges(STATE, RANGES))[1]
    monkeypatch.setattr(canonical, "NEWEST", {kind: n for kind, n in canonical.NEWEST.items() if kind != "thaw.state"})
    with pytest.raises(NewerFormat, match=r"is a thaw\.state/2: written by a newer thaw"):
        canonical.decode(data, State)
