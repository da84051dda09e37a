"""Adapters of a served engine, without one: what a client knows of them, and what an engine does of their files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from served_stand import Joined, adapter_folder, joined
from thaw.core.errors import IdentityMismatch, NotFound
from thaw.engines.served.protocol import Answer
from thaw.testing.laws.kit import Lab, greedy, ids
from thaw.testing.plans import mount_at

LIMIT_S = 10.0


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Joined]:
    with joined(tmp_path / "mail", max_adapters=2) as found:
        yield found


def test_a_live_session_goes_on_under_the_name_that_its_adapter_has_now(
    client: Joined, lab: Lab, tmp_path: Path
) -> None:
    """Its server's operator has unloaded it, and loaded the same content under another name."""
    found = client.engine.load_adapter("law", adapter_folder(tmp_path / "law"))
    reads, answers = (client.engine.open(adapter="law") for _ in range(2))
    for session in (reads, answers):
        client.engine.append(session, ids(20)).result(LIMIT_S)
    client.stand.folders["law-2"] = client.stand.folders.pop("law")
    client.engine.append(reads, ids(20)).result(LIMIT_S)
    client.stand.folders["law-3"] = client.stand.folders.pop("law-2")
    assert lab.one(client.engine, answers, greedy(1)).token_ids
    assert client.engine.adapters() == {"law-3": found}


def test_where_no_name_is_left_the_session_is_refused_and_can_be_kept(client: Joined, tmp_path: Path) -> None:
    """Its KV is in the arena, and its identity is the adapter's content."""
    found = client.engine.load_adapter("law", adapter_folder(tmp_path / "law"))
    session = client.engine.open(adapter="law")
    client.engine.append(session, ids(20)).result(LIMIT_S)
    other = client.engine.load_adapter("code", adapter_folder(tmp_path / "code", 1))
    del client.stand.folders["law"]
    with pytest.raises(NotFound, match=rf"no adapter {found}; it has 'code' \({other[:19]}"):
        client.engine.append(session, ids(20)).result(LIMIT_S)
    assert client.engine.identity(found).adapter == client.engine.view(session).adapter == found
    for use in (client.engine.identity, lambda name: client.engine.open(adapter=name)):
        with pytest.raises(NotFound, match="no adapter 'law'"):
            use("law")


def test_a_name_under_which_the_engine_runs_something_else_is_not_believed_again(
    client: Joined, tmp_path: Path
) -> None:
    client.engine.load_adapter("law", adapter_folder(tmp_path / "law"))
    session = client.engine.open(adapter="law")
    folder = client.stand.folders.pop("law")
    client.stand.folders |= {"law": str(adapter_folder(tmp_path / "code", 1)), "law-2": folder}
    client.stand.answer = lambda _: Answer(kind=IdentityMismatch.kind, error="it is another's")
    with pytest.raises(IdentityMismatch, match="another's"):
        client.engine.append(session, ids(20)).result(LIMIT_S)
    client.stand.answer = client.stand.agree
    client.engine.append(session, ids(20)).result(LIMIT_S)
    assert [one.name for one in client.stand.named] == ["law", "law-2"]
