"""The tier of a test, by a mark that says why. What has none is fast, and runs in `make test-fast`.

    slow("why")                      takes more than a few seconds
    model("why")                     runs the real model; the fixture demo_model marks a test that asks for it
    all_cores("why")                 its law is about an engine on several cores: it has the machine to itself
    gpu                              needs a GPU
    soak("why", receipt="name")      only in `make soak`, where it leaves receipts/soak/name.json; covers=("src/…", …)
                                     says what that is of, where the place of the test does not (`soak_receipts.py`)
    longer_in_soak("why", receipt=)  runs in `make test`, and in the soak for longer, with a receipt likewise

A plugin of pytest. A mark without its reason, or of the soak without its receipt, ends the run before a test is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from soak_receipts import MARKS, Unclear, read_marks

WITH_REASON = ("slow", "model", "all_cores", *MARKS)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in given(item):
            item.add_marker(mark)
    wrong = [f"{item.nodeid}: {said}" for item in items for said in faults(item)]
    if wrong:
        raise pytest.UsageError(*wrong)


def given(item: pytest.Item) -> Iterator[pytest.MarkDecorator]:
    """Marks that nobody can forget."""
    if "demo_model" in getattr(item, "fixturenames", ()):
        yield pytest.mark.model("it asks for the real model")


@cache
def receipts_in(file: Path, root: Path) -> frozenset[str]:
    """Those that lint reads in a file of tests. Raises `Unclear`."""
    return frozenset(receipt for _, receipt, _ in read_marks(file, file.relative_to(root).as_posix()))


def faults(item: pytest.Item) -> Iterator[str]:
    for name in WITH_REASON:
        for mark in item.iter_markers(name):
            if not (mark.args and isinstance(mark.args[0], str) and mark.args[0].strip()):
                yield f'the mark {name} does not say why: pytest.mark.{name}("…")'
            if name in MARKS:
                yield from without_receipt(item, mark)


def without_receipt(item: pytest.Item, mark: pytest.Mark) -> Iterator[str]:
    receipt = mark.kwargs.get("receipt")
    try:
        if not receipt:
            yield f'the mark {mark.name} does not name the receipt that the test leaves: receipt="…"'
        elif receipt not in receipts_in(item.path, item.config.rootpath):
            written = f"@pytest.mark.{mark.name}(…)"
            yield f"the mark {mark.name} is not written out in its file as {written}: lint does not see it"
    except Unclear as unclear:
        yield str(unclear)
