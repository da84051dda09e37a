"""A fake engine and a repository, new for every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import thaw
from thaw.engines.base import Engine
from thaw.repo import Repository


@pytest.fixture
def engine() -> Iterator[Engine]:
    with thaw.load_engine("fake") as running:
        yield running


@pytest.fixture
def repo(tmp_path: Path, engine: Engine) -> Iterator[Repository]:
    with thaw.open(tmp_path / "runs", engine=engine) as opened:
        yield opened


@pytest.fixture
def slow_engine() -> Iterator[Engine]:
    """Every forward pass takes a millisecond, so that a test can act in the middle of a generation."""
    with thaw.load_engine("fake", step_s=0.001) as running:
        yield running
