"""A place for graphs, new for every test. The folder is skipped where the extra [langgraph] is not installed. It is not
named as the package is: it would be found in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from langgraph_stand import Place


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Place]]:
    """Open a place; all are closed at the end. Options are the fake engine's."""
    from langgraph_stand import Place

    with ExitStack() as stack:

        def make(name: str = "runs", **options: Any) -> Place:
            place = Place(tmp_path / name, **options)
            stack.callback(place.close)
            return place

        yield make


@pytest.fixture
def place(begin: Callable[..., Place]) -> Place:
    return begin()
