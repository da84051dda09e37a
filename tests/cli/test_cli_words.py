"""Numbers as people read them."""

from __future__ import annotations

import pytest

from thaw.cli import words


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (91_692_672, "87.4 MiB"), (1 << 30, "1.0 GiB"),
     (150 << 20, "150 MiB"), ((1 << 20) - 1, "1.0 MiB")],
)  # fmt: skip
def test_bytes(n: int, text: str) -> None:
    assert words.nbytes(n) == text


@pytest.mark.parametrize(
    ("s", "text"),
    [(0.00042, "0.42 ms"), (0.0131, "13.1 ms"), (0.131, "131 ms"), (0.9996, "1.00 s"), (4.914, "4.91 s"),
     (48.62, "48.6 s"), (125.2, "2 min 5 s")],
)  # fmt: skip
def test_seconds(s: float, text: str) -> None:
    assert words.seconds(s) == text


@pytest.mark.parametrize(
    ("ago", "text"),
    [(-5, "now"), (0.5, "now"), (1, "1 second ago"), (59, "59 seconds ago"), (60, "1 minute ago"),
     (7200, "2 hours ago"), (3 * 86400, "3 days ago")],
)  # fmt: skip
def test_age(ago: float, text: str) -> None:
    now = 1_900_000_000.0
    assert words.age(int((now - ago) * 1e9), now) == text
