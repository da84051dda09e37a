"""Several served engines as one, without any: what it says that it has, and what concerns all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from served_stand import Joined, adapter_folder, joined
from thaw.core.errors import InvalidRequest, Unsupported
from thaw.engines.vllm.client.fleet import DataParallelEngine

HERE, THERE = "http://localhost:8000", "http://localhost:8001"


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[Joined]]:
    """Two ranks of one server, and the only one of another."""
    with ExitStack() as stack:
        found = [stack.enter_context(joined(tmp_path / f"dp{rank}", max_adapters=2)) for rank in range(3)]
        found[1].stand.folders = found[0].stand.folders
        for one, url in zip(found, (HERE, HERE, THERE), strict=True):
            one.engine.options = {"url": url}
        yield found


@pytest.fixture
def fleet(ranks: list[Joined]) -> DataParallelEngine:
    return DataParallelEngine([one.engine for one in ranks])


def test_it_says_that_it_has_what_it_has(ranks: list[Joined], fleet: DataParallelEngine) -> None:
    assert fleet.info.capabilities == ranks[0].engine.info.capabilities - {"beside", "sleep"}
    assert {"sleep", "adapters"} <= ranks[0].engine.info.capabilities
    with pytest.raises(Unsupported, match="no sleep mode"):
        fleet.require_sleep()


def test_an_adapter_is_loaded_once_into_each_server(
    ranks: list[Joined], fleet: DataParallelEngine, tmp_path: Path
) -> None:
    """And every rank runs sessions under it. The control: a server refuses a name that it has."""
    found = fleet.load_adapter("law", adapter_folder(tmp_path / "law"))
    assert fleet.adapters() == {"law": found}
    for one in ranks:
        assert one.engine.view(one.engine.open(adapter="law")).adapter == found
        with pytest.raises(InvalidRequest, match="already been loaded"):
            one.engine.load_adapter("law", tmp_path / "law")
