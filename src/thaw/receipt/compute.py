"""Computing what a receipt says from its rounds. `make` uses it to write, `verify` to check; there is no second way."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from thaw.core import canonical
from thaw.core.errors import InvalidRequest
from thaw.core.ids import digest
from thaw.receipt import statistics
from thaw.receipt.format import Arm, Check, Derived, Goal, Receipt, Round, Term


def digest_of(receipt: Receipt) -> str:
    """The digest of a receipt's content: of its canonical JSON without the field `digest`."""
    plain = canonical.to_plain(receipt)
    del plain["digest"]
    return digest(canonical.encode(plain))


def derived(arms: Sequence[Arm], asked: Derived) -> Derived:
    """`asked` with its numbers computed from the rounds. Raises `InvalidRequest` when they cannot be."""
    if asked.how == "median":
        values = list(_values(arms, asked.over).values())
        numbers, count = statistics.summary(values), len(values)
    else:
        over, under = _paired(arms, asked)
        count = len(over)
        numbers = (statistics.ratio if asked.how == "ratio" else statistics.quotient)(over, under)
    if not all(map(math.isfinite, numbers)):
        raise InvalidRequest(f"{asked.name}: the rounds give no finite number")
    value, low, high = numbers
    return msgspec.structs.replace(asked, value=value, low=low, high=high, num_rounds=count)


def check(arms: Sequence[Arm], asked: Check) -> Check:
    """`asked` with its counts. Raises `InvalidRequest` when an arm that it names is not there."""
    rounds = _rounds(arms, asked.arm)
    if asked.how == "all-hit":
        verdicts = [r.hits.num_cached_tokens >= r.hits.num_wanted_tokens for r in rounds.values() if r.hits]
    else:
        output = asked.output or ""
        others = _rounds(arms, asked.reference or "")
        pairs = [(r, others[pair]) for pair, r in rounds.items() if pair in others]
        verdicts = [
            a.outputs[output] == b.outputs[output] for a, b in pairs if output in a.outputs and output in b.outputs
        ]
    checked, equal = len(verdicts), sum(verdicts)
    return msgspec.structs.replace(asked, num_checked=checked, num_equal=equal, held=0 < checked == equal)


def goal(numbers: Sequence[Derived], asked: Goal) -> Goal:
    """`asked` with its verdict: whether the interval of its number reaches the bound, and whether all of it does."""
    found = next((n for n in numbers if n.name == asked.derived), None)
    if found is None:
        raise InvalidRequest(f"goal {asked.name}: there is no derived number {asked.derived!r}")
    ends = [x >= asked.bound if asked.relation == "at-least" else x <= asked.bound for x in (found.low, found.high)]
    return msgspec.structs.replace(asked, held=any(ends), clear=all(ends))


def _paired(arms: Sequence[Arm], asked: Derived) -> tuple[list[float], list[float]]:
    if asked.under is None:
        raise InvalidRequest(f"{asked.name}: a {asked.how} needs `under`")
    over, under = _values(arms, asked.over), _values(arms, asked.under)
    pairs = [pair for pair in over if pair in under]
    if not pairs:
        raise InvalidRequest(f"{asked.name}: {asked.over.arm!r} and {asked.under.arm!r} have no paired rounds")
    return [over[pair] for pair in pairs], [under[pair] for pair in pairs]


def _values(arms: Sequence[Arm], term: Term) -> dict[int, float]:
    """A term's value by pair number, of the rounds that have it."""
    names = (term.value,) if term.minus is None else (term.value, term.minus)
    found = {
        pair: r.values[term.value] - (r.values[term.minus] if term.minus is not None else 0.0)
        for pair, r in _rounds(arms, term.arm).items()
        if all(name in r.values for name in names)
    }
    if not found:
        raise InvalidRequest(f"no round of {term.arm!r} has {' and '.join(names)}")
    return found


def _rounds(arms: Sequence[Arm], name: str) -> dict[int, Round]:
    arm = next((a for a in arms if a.name == name), None)
    if arm is None:
        raise InvalidRequest(f"there is no arm {name!r}")
    rounds = {r.pair: r for r in arm.rounds}
    if len(rounds) != len(arm.rounds):
        raise InvalidRequest(f"arm {name!r} has two rounds with one pair number")
    return rounds
