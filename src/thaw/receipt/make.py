"""Writing receipts: rounds and questions in, a sealed receipt out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from thaw.core import canonical
from thaw.core.errors import InvalidRequest
from thaw.receipt import compute
from thaw.receipt.format import Arm, Check, Derived, Goal, Machine, Model, Receipt, Scalar, Term

_UNSEALED = "b3:" + "0" * 64


def median(name: str, text: str, unit: str, over: Term) -> Derived:
    """Ask for the median of a value over an arm's rounds."""
    return _ask(name, text, unit, "median", over, None)


def ratio(name: str, text: str, over: Term, under: Term) -> Derived:
    """Ask for the ratio of paired rounds with its 95 % interval."""
    return _ask(name, text, "×", "ratio", over, under)


def quotient(name: str, text: str, unit: str, over: Term, under: Term) -> Derived:
    """Ask for the median quotient of paired rounds, for values that may be zero or negative."""
    return _ask(name, text, unit, "quotient", over, under)


def _ask(
    name: str, text: str, unit: str, how: Literal["median", "ratio", "quotient"], over: Term, under: Term | None
) -> Derived:
    return Derived(
        name=name, text=text, unit=unit, how=how, over=over, under=under, value=0.0, low=0.0, high=0.0, num_rounds=1
    )


def equal_outputs(name: str, text: str, arm: str, reference: str, output: str, *, promised: bool) -> Check:
    """Ask in how many rounds an output of `arm` equals that of `reference`."""
    return Check(
        name=name, text=text, how="equal-outputs", arm=arm, reference=reference, output=output,
        promised=promised, num_checked=0, num_equal=0, held=False,
    )  # fmt: skip


def all_hit(name: str, text: str, arm: str) -> Check:
    """Ask in how many rounds of `arm` the engine found every wanted token in its cache."""
    return Check(
        name=name, text=text, how="all-hit", arm=arm, promised=True, num_checked=0, num_equal=0, held=False
    )  # fmt: skip


def at_least(name: str, text: str, derived: str, bound: float) -> Goal:
    return Goal(name=name, text=text, derived=derived, relation="at-least", bound=bound, held=False, clear=False)


def at_most(name: str, text: str, derived: str, bound: float) -> Goal:
    return Goal(name=name, text=text, derived=derived, relation="at-most", bound=bound, held=False, clear=False)


def make(
    *,
    kind: str,
    command: str,
    versions: Mapping[str, str],
    machine: Machine,
    model: Model | None,
    parameters: Mapping[str, Scalar],
    arms: Sequence[Arm],
    derived: Sequence[Derived] = (),
    checks: Sequence[Check] = (),
    goals: Sequence[Goal] = (),
    notes: Sequence[str] = (),
    time_s: float | None = None,
) -> Receipt:
    """The sealed receipt of a run. Raises `InvalidRequest` when a question cannot be answered from the rounds."""
    numbers = tuple(compute.derived(arms, asked) for asked in derived)
    receipt = Receipt(
        kind=kind,
        command=command,
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_s)),
        versions=dict(versions),
        machine=machine,
        model=model,
        parameters=dict(parameters),
        arms=tuple(arms),
        derived=numbers,
        checks=tuple(compute.check(arms, asked) for asked in checks),
        goals=tuple(compute.goal(numbers, asked) for asked in goals),
        notes=tuple(notes),
        digest=_UNSEALED,
    )
    try:
        canonical.prepare(Receipt)
        msgspec.convert(canonical.to_plain(receipt), Receipt)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"this is no receipt: {error}") from None
    return msgspec.structs.replace(receipt, digest=compute.digest_of(receipt))


def dumps(receipt: Receipt) -> bytes:
    """The receipt as JSON for a file: one value a line, so that receipts can be compared in a diff."""
    return msgspec.json.format(msgspec.json.encode(receipt), indent=1) + b"\n"
