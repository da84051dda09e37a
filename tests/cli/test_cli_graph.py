"""The drawing of the tree: every commit has one row, lines lead from children to parents."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from thaw.cli import graph


def draw(*commits: tuple[str, str]) -> list[str]:
    """Rows for (id, parents as letters)."""
    rows = graph.draw(((name, tuple(parents)) for name, parents in commits), graph.UNICODE)
    return [f"{row.gutter} {row.id or ''}".rstrip() for row in rows]


def test_a_line_of_commits_is_a_column() -> None:
    assert draw(("c", "b"), ("b", "a"), ("a", "")) == ["● c", "● b", "● a"]


def test_children_join_above_their_parent() -> None:
    assert draw(("d", "a"), ("c", "a"), ("b", "a"), ("a", "")) == ["● d", "│ ● c", "│ │ ● b", "├─┴─╯", "● a"]


def test_a_join_crosses_a_line_that_goes_on() -> None:
    drawn = draw(("d", "a"), ("c", "x"), ("b", "a"), ("a", ""), ("x", ""))
    assert drawn == ["● d", "│ ● c", "│ │ ● b", "├─┼─╯", "● │ a", "  ● x"]


def test_a_merge_opens_a_column_for_each_other_parent() -> None:
    assert draw(("m", "ab"), ("b", "a"), ("a", "")) == ["● m", "├─╮", "│ ● b", "├─╯", "● a"]


def test_trees_of_their_own_stand_below_one_another() -> None:
    assert draw(("b", ""), ("a", "")) == ["● b", "● a"]


@st.composite
def histories(draw_from: st.DrawFn) -> list[tuple[str, tuple[str, ...]]]:
    """Commits with children first; each has up to three of the older ones as parents."""
    n = draw_from(st.integers(1, 14))
    parents = [draw_from(st.sets(st.integers(0, i - 1), max_size=3)) if i else set() for i in range(n)]
    return [(str(i), tuple(str(p) for p in sorted(parents[i]))) for i in reversed(range(n))]


@given(histories())
def test_every_commit_has_one_row_and_one_node(commits: list[tuple[str, tuple[str, ...]]]) -> None:
    rows = list(graph.draw(commits, graph.UNICODE))
    assert [row.id for row in rows if row.id is not None] == [name for name, _ in commits]
    for row in rows:
        assert row.gutter.count("●") == (row.id is not None)


@given(histories())
def test_ascii_has_the_same_shape(commits: list[tuple[str, tuple[str, ...]]]) -> None:
    fancy, plain = (list(graph.draw(commits, glyphs)) for glyphs in (graph.UNICODE, graph.ASCII))
    assert [(len(row.gutter), row.id) for row in fancy] == [(len(row.gutter), row.id) for row in plain]
    assert all(row.gutter.isascii() for row in plain)
