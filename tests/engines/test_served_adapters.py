"""Adapters of a served engine, without one: what a client knows of them, and what an engine does of their files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from served_stand import Joined, adapter_folder, joined
from thaw.core.errors import IdentityMismatch, NotFound, Unsupported
from thaw.engines.hf import adapter
from thaw.engines.served import adapters
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


# -- in the engine


CUT = """
import os, sys
from pathlib import Path
from thaw.core.errors import ThawError
from thaw.engines.hf import adapter
from thaw.engines.served.adapters import EngineAdapters

folder, hashed = Path(sys.argv[1]), adapter.hashed

def cut(*given):
    os.truncate(folder / adapter.ADAPTER_FILE, 200)
    return hashed(*given)

print(EngineAdapters().id_of(1, str(folder)))
adapter.hashed = cut
try:
    EngineAdapters().id_of(1, str(folder))
except ThawError as error:
    print(error.kind, error)
"""


def test_a_file_that_is_cut_short_while_it_is_hashed_costs_the_request(tmp_path: Path) -> None:
    """In a process of its own: a file that is mapped would end it, as it would end the engine."""
    folder = adapter_folder(tmp_path / "law")
    done = subprocess.run([sys.executable, "-c", CUT, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, said = done.stdout.splitlines()
    assert found == adapter.id_of(adapter_folder(folder))
    assert said.startswith("unsupported") and "changes while it is read" in said


def test_an_engine_forgets_no_adapter_and_refuses_one_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "MOST", 2)
    known, folders = adapters.EngineAdapters(), [adapter_folder(tmp_path / f"{n}", n) for n in range(3)]
    ids_of = [known.id_of(n, str(folders[n])) for n in range(2)]
    with pytest.raises(Unsupported, match="under 2 adapters"):
        known.id_of(2, str(folders[2]))
    assert [known.id_of(n, str(folders[n])) for n in range(2)] == ids_of
    adapter_folder(folders[0], 9)
    with pytest.raises(Unsupported, match="were changed after it was first used"):
        known.id_of(0, str(folders[0]))
