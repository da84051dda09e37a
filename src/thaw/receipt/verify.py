"""Checking a receipt: its form, its digest, and every figure computed again from its rounds."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from thaw.core.errors import CorruptBlob, InvalidRequest
from thaw.receipt import compute
from thaw.receipt.format import Check, Derived, Goal, Receipt
from thaw.receipt.read import Source, read

RELATIVE = 1e-9
"""How far a recomputed number may lie from the written one: logarithms differ in the last bits between machines."""


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What `verify` found. `problems` is empty when the receipt is what it was when it was sealed, and adds up."""

    receipt: Receipt
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def require(self) -> Receipt:
        """The receipt; raises `CorruptBlob` with the problems if there are any."""
        if self.problems:
            raise CorruptBlob(f"the receipt does not hold: {'; '.join(self.problems[:5])}")
        return self.receipt


def verify(source: Source | Receipt) -> Verified:
    """Check a receipt: a path, bytes, or the JSON value itself.

    Raises `NotFound`, `StorageFailed`, `NewerFormat`, and `CorruptBlob` when it is no receipt at all. A receipt whose
    digest or figures are wrong is returned with its problems.
    """
    receipt = source if isinstance(source, Receipt) else read(source)
    return Verified(receipt=receipt, problems=tuple(_problems(receipt)))


def _problems(receipt: Receipt) -> Iterator[str]:
    found = compute.digest_of(receipt)
    if found != receipt.digest:
        yield f"digest: the content hashes to {found[:19]}…, the receipt says {receipt.digest[:19]}…: it was changed"
    yield from _doubles("arm", [arm.name for arm in receipt.arms])
    yield from _doubles("derived number", [number.name for number in receipt.derived])
    for number in receipt.derived:
        yield from _recompute_number(receipt, number)
    for check in receipt.checks:
        yield from _recompute_check(receipt, check)
    for goal in receipt.goals:
        yield from _recompute_goal(receipt, goal)


def _doubles(what: str, names: list[str]) -> Iterator[str]:
    if len(set(names)) != len(names):
        yield f"two {what}s have one name"


def _recompute_number(receipt: Receipt, written: Derived) -> Iterator[str]:
    try:
        ours = compute.derived(receipt.arms, written)
    except InvalidRequest as error:
        yield f"{written.name}: {error}"
        return
    for field in ("value", "low", "high"):
        a, b = getattr(written, field), getattr(ours, field)
        if not math.isclose(a, b, rel_tol=RELATIVE, abs_tol=1e-300):
            yield f"{written.name}: {field} is written as {a!r}, the rounds give {b!r}"
    if written.num_rounds != ours.num_rounds:
        yield f"{written.name}: {written.num_rounds} rounds are written, there are {ours.num_rounds}"


def _recompute_check(receipt: Receipt, written: Check) -> Iterator[str]:
    try:
        ours = compute.check(receipt.arms, written)
    except InvalidRequest as error:
        yield f"check {written.name}: {error}"
        return
    if written != ours:
        yield (
            f"check {written.name}: written as {written.num_equal} of {written.num_checked}, held {written.held}; "
            f"the rounds give {ours.num_equal} of {ours.num_checked}"
        )


def _recompute_goal(receipt: Receipt, written: Goal) -> Iterator[str]:
    try:
        ours = compute.goal(receipt.derived, written)
    except InvalidRequest as error:
        yield str(error)
        return
    if written != ours:
        yield f"goal {written.name}: written as {verdict(written)}, its number says {verdict(ours)}"


def verdict(goal: Goal) -> str:
    """A goal's outcome in words."""
    if not goal.held:
        return "missed"
    return "held" if goal.clear else "held within the interval"
