"""Two hosts on one machine: a repository each, with one fake engine each, and a folder between them."""

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
def far_engine() -> Iterator[Engine]:
    """The other host's: what it knows came through the remote."""
    with thaw.load_engine("fake") as running:
        yield running


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    return tmp_path / "bucket"


@pytest.fixture
def here(tmp_path: Path, engine: Engine, bucket: Path) -> Iterator[Repository]:
    """A repository that knows the folder as `origin`."""
    with thaw.open(tmp_path / "here", engine=engine) as repo:
        repo.add_remote("origin", bucket.as_uri())
        yield repo
