"""The picture of a receipt: well-formed, self-contained, honest about its axis."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from receipt_samples import sample

from thaw import receipt as r
from thaw.bench import fork, plot, scale
from thaw.core.errors import InvalidRequest


@pytest.fixture(scope="module")
def receipt() -> r.Receipt:
    return fork.run(fork.quick(disk_children=0))


def test_the_picture_is_well_formed_and_needs_nothing_from_outside(receipt: r.Receipt) -> None:
    picture = plot.svg(receipt)
    root = ElementTree.fromstring(picture)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert not re.search(r"href|<script|@import|url\(", picture)
    assert "prefers-color-scheme:dark" in picture
    assert picture == plot.svg(receipt) == plot.svg(r.dumps(receipt))


def test_bars_are_as_long_as_their_numbers(receipt: r.Receipt) -> None:
    root = ElementTree.fromstring(plot.svg(receipt))
    bars = [b for b in root.iter("{http://www.w3.org/2000/svg}rect") if b.get("x") == str(plot.LEFT)]
    rows = [name for name, *_ in plot.ROWS for n in ("1", "4") if receipt.number(f"{name}.{n}.first")]
    assert len(bars) == len(rows)
    widths = [float(b.get("width", "0")) for b in bars]
    numbers = [
        number.value
        for name, *_ in plot.ROWS
        for n in ("1", "4")
        if (number := receipt.number(f"{name}.{n}.first")) is not None
    ]
    longest = max(range(len(numbers)), key=numbers.__getitem__)
    for width, number in zip(widths, numbers, strict=True):
        assert width == pytest.approx(max(1, widths[longest] * number / numbers[longest]), abs=0.2)


def test_everything_stays_on_the_paper(receipt: r.Receipt) -> None:
    root = ElementTree.fromstring(plot.svg(receipt))
    width, height = float(root.get("width", "0")), float(root.get("height", "0"))
    for part in root.iter():
        assert 0 <= float(part.get("x", "0")) <= width and 0 <= float(part.get("y", "0")) <= height


def test_a_receipt_of_another_kind_has_no_picture() -> None:
    with pytest.raises(InvalidRequest, match=r"bench\.test"):
        plot.svg(sample())


@given(st.floats(1e-6, 1e6))
def test_the_axis_begins_at_zero_and_holds_the_largest(largest: float) -> None:
    axis = scale.Axis(largest, 100, 900)
    assert axis.ticks[0] == 0 and axis.x(0) == 100
    assert axis.top >= largest * (1 - 1e-6) and 2 <= len(axis.ticks) <= 8
    assert len({scale.label(tick, axis.step) for tick in axis.ticks}) == len(axis.ticks)


def test_figures_and_durations_read_well() -> None:
    assert [scale.figures(x) for x in (0.01234, 1.234, 34.12, 1234.5)] == ["0.0123", "1.23", "34.1", "1,234"]
    assert [scale.seconds(x) for x in (0.00742, 0.131, 4.912, 34.12)] == ["7.4 ms", "131 ms", "4.91 s", "34.1 s"]
