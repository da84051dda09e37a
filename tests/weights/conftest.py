"""Repositories with weights in them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import thaw
from thaw.repo import Repository
from thaw.store import Store
from thaw.weights import WeightsBook


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.init(tmp_path / "repo") as made:
        yield made


@pytest.fixture
def book(store: Store) -> WeightsBook:
    return WeightsBook(store)


@pytest.fixture
def book_of_base(book: WeightsBook, tiny_model: Callable[..., Path]) -> WeightsBook:
    """With a model that every engine runs, as `base`."""
    book.add(tiny_model("llama", dtype="bfloat16", head_dim=64), "base")
    return book


@pytest.fixture
def repo(tmp_path: Path) -> Iterator[Repository]:
    with thaw.open(tmp_path / "repo", create=True) as made:
        yield made


@pytest.fixture
def own_model(tmp_path: Path, tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    """A copy of a small model's folder that a test may change or remove."""

    def make(name: str = "base", arch: str = "llama", **shape: object) -> Path:
        return Path(shutil.copytree(tiny_model(arch, **shape), tmp_path / name))

    return make
