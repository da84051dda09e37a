"""Old bytes stay readable: checked-in repositories of every format version, and the digest of a pack's every byte."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path

import msgspec
import pytest

from thaw.core.ids import digest
from thaw.core.objects import ChatTurn, Commit, Segment, SegmentNode, State, Turn, TurnNode
from thaw.data.header import OBJECT
from thaw.data.pack import PackItem, read_blob, write_pack
from thaw.repo import conversation
from thaw.store import Store, fsck

HERE = Path(__file__).parent
FORMATS = sorted(path.name for path in HERE.glob("format-*") if path.is_dir())


@pytest.fixture(params=FORMATS)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, dict[str, str]]]:
    """A copy of a golden repository, and what its maker wrote down."""
    shutil.copytree(HERE / request.param, tmp_path / "repo")
    return tmp_path / "repo", json.loads((HERE / f"{request.param}.json").read_text())


def test_a_golden_repository_is_whole(golden: tuple[Path, dict[str, dict[str, str]]]) -> None:
    path, known = golden
    packs = {pack.name: digest(pack.read_bytes()) for pack in (path / "packs").iterdir()}
    assert packs == known["packs"]
    assert fsck(path).problems == []


@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_golden_repository_stays_readable(golden: tuple[Path, dict[str, dict[str, str]]], rebuilt: bool) -> None:
    path, known = golden
    ids = known["ids"]
    if rebuilt:
        (path / "thaw.db").unlink()
        assert fsck(path, rebuild=True).ok
    with Store.open(path) as store:
        assert store.uuid == ids["uuid"] and store.head == "fork"
        assert store.get_setting("model") == '"/models/golden"'
        assert {(ref.name, ref.kind, ref.target) for ref in store.refs()} == {
            ("main", "branch", ids["merge"]),
            ("fork", "branch", ids["fork"]),
            ("v1", "tag", ids["first"]),
        }
        assert [entry.new for entry in store.reflog("main")] == [ids["merge"], ids["first"]]
        assert list(store.commits()) == [ids["first"], ids["fork"], ids["merge"]]
        for one in store.commits():
            check_commit(store, one)
        assert store.get_as(ids["merge"], Commit).parents == (ids["first"], ids["fork"])


def check_commit(store: Store, identifier: str) -> None:
    """Every field that the maker set is read as it was, and all bytes verify."""
    commit = store.get_as(identifier, Commit)
    state = store.get_as(commit.state, State)
    assert commit.meta == {"git": "0123abc"} and commit.message.endswith("\nsecond line")
    assert state.seed == 2**63 + 1 and state.boundary is not None and state.boundary.hidden is not None
    covered = 0
    for node in state.nodes:
        for entry in store.get_as(node, SegmentNode).entries:
            segment = store.get_as(entry.segment, Segment)
            assert entry.start == covered == segment.start
            covered += entry.length
            assert len(segment.tokens) == used(
                store, dict(store.find_segments(segment.window))[entry.segment], entry.segment
            )
            for place in store.locate(segment.blobs["full"]).values():
                assert len(read_blob(store.packs, place)) == len(segment.tokens) * 16
    assert covered == state.num_kv
    (place,) = store.locate([state.boundary.hidden]).values()
    assert len(read_blob(store.packs, place)) == 16
    prompt, completion = (store.get_as(one, Turn) for one in store.get_as(state.turn_nodes[0], TurnNode).entries)
    if isinstance(prompt, ChatTurn):
        check_chat(prompt)
    assert prompt.text == "Grüße,\n\u2028 \U0001f9ca?"
    assert completion.seed == 2**64 - 1 and completion.sampling is not None and completion.sampling.seed == 2**64 - 1
    assert completion.logprobs == (-0.25, -1e-07)
    assert completion.entropies == ((0.5, 2.25) if isinstance(prompt, ChatTurn) else msgspec.UNSET)


def check_chat(turn: ChatTurn) -> None:
    held = conversation.read([turn], turn.end)
    assert held.messages == [
        {"role": "system", "content": "kühl"},
        {"role": "user", "content": [{"type": "text", "text": "Grüße,"}]},
    ]
    assert turn.chat.continue_final_message and held.pieces[0].open
    assert held.settings.variables == {"enable_thinking": False} and list(held.settings.tools[0]) == ["z", "a"]
    assert held.settings.moment == datetime(2026, 11, 29, 3, 4, 5)


def test_golden_repositories_have_turns_with_and_without_messages(tmp_path: Path) -> None:
    found = {name: kinds_of_turns(shutil.copytree(HERE / name, tmp_path / name)) for name in FORMATS}
    assert found == {"format-1": {Turn}, "format-2": {Turn, ChatTurn}}


def kinds_of_turns(path: Path) -> set[type]:
    with Store.open(path) as store:
        states = [store.get_as(store.get_as(one, Commit).state, State) for one in store.commits()]
        nodes = [store.get_as(node, TurnNode) for state in states for node in state.turn_nodes]
        return {type(store.get(one)) for node in nodes for one in node.entries}


def used(store: Store, state: str, segment: str) -> int:
    """How many tokens of a segment a state uses."""
    nodes = store.get_as(state, State).nodes
    (entry,) = [e for node in nodes for e in store.get_as(node, SegmentNode).entries if e.segment == segment]
    return entry.length


def test_a_pack_of_these_items_has_these_bytes(tmp_path: Path) -> None:
    """The writer is a pure function of its items: header, order, padding and digest are fixed by the format."""
    items = [
        PackItem("", "BF16", (2, 3), 12, lambda: bytes(range(12))),
        PackItem("", "F32", (1 << 18,), 1 << 20, lambda: b"\x01\x02\x03\x04" * (1 << 18)),
        PackItem(OBJECT, "U8", (2,), 2, lambda: b"{}"),
        PackItem("", "BF16", (2, 3), 12, lambda: bytes(range(12))),
    ]
    result = write_pack(tmp_path, "p.safetensors", items, metadata={"thaw.store": "u"})
    assert [place.offset for place in result.blobs] == [4096, 8192, 8192 + (1 << 20), 4096]
    assert result.nbytes == 8192 + (1 << 20) + 2
    assert digest((tmp_path / "p.safetensors").read_bytes()) == GOLDEN_PACK


GOLDEN_PACK = "b3:1993d47c9a1c7197385d0bb5745e5f369814d9841aee6d5b8a1b2abb4fb32fe3"
