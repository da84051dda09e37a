"""Points: how people name a place in history."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from thaw.core.errors import BadPoint, ThawError
from thaw.core.points import Point, check_name, parse

SPELLINGS = {
    "main": Point(name="main"),
    "HEAD": Point(name="HEAD"),
    "main~": Point(name="main", back=1),
    "main~2": Point(name="main", back=2),
    "main@{1}": Point(name="main", moved=1),
    "main@{1}~2": Point(name="main", moved=1, back=2),
    "main:turn=3": Point(name="main", turn=3),
    "main:token=1200": Point(name="main", token=1200),
    "main:1200": Point(name="main", token=1200),
    "main:0": Point(name="main", token=0),
    "feature/x-1.2:turn=0": Point(name="feature/x-1.2", turn=0),
    "b3:0123abcd": Point(name="0123abcd"),
    "b3:" + "a" * 64 + "~1:token=5": Point(name="a" * 64, back=1, token=5),
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_every_spelling_means_one_point(text: str) -> None:
    assert parse(text) == SPELLINGS[text]


@pytest.mark.parametrize("point", SPELLINGS.values(), ids=str)
def test_a_point_prints_as_it_is_read(point: Point) -> None:
    assert parse(str(point)) == point


@pytest.mark.parametrize(
    "text",
    ["", " ", "main main", "main:", "main:x", "main:turn=", "main:-1", "main:turn=-1", "main~x", "main@{x}", "main@{}",
     "main:1:2", ":5", "~1", "@{1}", "main:turn=1234567890", "main~1234567", "a..b", "a//b", "a.lock", "/a", "a/", "-a",
     "main\n", "ma\0in", "\u00e4", "main:token=1 ", "x" * 201, "x" * 10_000],
)  # fmt: skip
def test_anything_else_is_refused_with_the_rule(text: str) -> None:
    with pytest.raises(BadPoint) as refusal:
        parse(text)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("name", ["main", "a", "_x", "a.b", "a/b", "0a", "a-b", "x" * 200])
def test_names_that_are_allowed(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".a", "a.", "a b", "a:b", "a~b", "a@b", "../a", "a/../b", "a\n", "x" * 201])
def test_names_that_are_not(name: str) -> None:
    with pytest.raises(BadPoint):
        check_name(name)


@given(st.text(max_size=300) | st.from_regex(r"[a-z@{}~:=0-9/.b3\u0660-\u0669\u00b2]{0,40}", fullmatch=True))
@example("main:\u0661")
@example("main~\u00b2")
@example("b3:b3:main")
def test_hostile_points_meet_only_thaws_own_errors(text: str) -> None:
    try:
        point = parse(text)
    except ThawError:
        return
    assert parse(str(point)) == point
