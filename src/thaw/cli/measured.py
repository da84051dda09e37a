"""Showing a receipt, and putting it into files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from thaw.cli import output, words
from thaw.core.errors import InvalidRequest

if TYPE_CHECKING:
    from thaw.receipt import Derived, Receipt


def keep(receipt: Receipt, out: str | None, svg: str | None) -> None:
    """Write the receipt and its picture where they were asked for."""
    from thaw.data.files import storage_errors
    from thaw.receipt import dumps

    for name, make in ((out, dumps), (svg, _picture)):
        if name is not None:
            path, data = Path(name).expanduser(), make(receipt)
            with storage_errors(path, "write"):
                path.write_bytes(data)
            output.note(f"wrote {name}")


def _picture(receipt: Receipt) -> bytes:
    from thaw.bench import plot

    try:
        return plot.svg(receipt).encode()
    except InvalidRequest as error:
        raise InvalidRequest(f"--svg: {error}") from None


def answer(receipt: Receipt, as_json: bool) -> int:
    """Say it, in the form that was asked for; the exit code."""
    if as_json:
        output.print_json(receipt)
    else:
        show(receipt)
    return 0 if all(check.held for check in receipt.checks if check.promised) else 7


def show(receipt: Receipt) -> None:
    """Every figure with its interval, then what was checked and what was aimed at."""
    model = f"{receipt.model.name}, {receipt.model.dtype}, " if receipt.model else ""
    output.line(output.style(f"{model}{receipt.machine.cpu}, {words.count(receipt.machine.cores, 'core')}", "bold"))
    output.line()
    output.rows([_number(number) for number in receipt.derived])
    output.line()
    promised = [check for check in receipt.checks if check.promised]
    held = sum(check.held for check in promised)
    colour = "green" if held == len(promised) else "red"
    output.line(f"{output.style('checks', colour)}  {held} of {len(promised)} promised checks held")
    for check in receipt.checks:
        if not check.held:
            mark, colour = ("FAILED", "red") if check.promised else ("no    ", "yellow")
            rounds = f"{check.num_equal} of {check.num_checked} rounds{'' if check.promised else ' (not promised)'}"
            output.line(f"{output.style(mark, colour)}  {check.text}: {rounds}")
    numbers = {number.name: number for number in receipt.derived}
    for goal in receipt.goals:
        mark, colour = ("met   ", "green") if goal.held else ("missed", "yellow")
        within = "" if goal.clear or not goal.held else ", within the interval"
        number = numbers[goal.derived]
        between = f" ({_between(number)})" if number.num_rounds > 1 else ""
        value = _value(number.value, number.unit)
        output.line(f"{output.style(mark, colour)}  {goal.text}{within}: {value}{between}")


def _number(number: Derived) -> tuple[str, ...]:
    between = "" if number.num_rounds == 1 else _between(number)
    return number.text, output.style(_value(number.value, number.unit), "bold"), output.style(between, "dim")


def _between(number: Derived) -> str:
    return f"{_value(number.low, number.unit)} to {_value(number.high, number.unit)}"


def _value(value: float, unit: str) -> str:
    if unit == "s":
        return words.seconds(value)
    if unit == "B":
        return words.nbytes(round(value))
    return f"{value:.3g} {unit}".rstrip()
