"""A second reader, written from docs/format.md alone: it imports nothing of thaw.

It opens the golden repositories by refs.json and packs, and checks the database's rows. When it breaks, either the
format or the page is wrong.
"""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
import struct
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from blake3 import blake3

HERE = Path(__file__).parent
FORMATS = sorted(path for path in HERE.glob("format-*") if path.is_dir())
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}


def b3(data: bytes) -> str:
    return "b3:" + blake3(data).hexdigest()


def read_packs(folder: Path) -> dict[str, bytes]:
    """{tensor name: bytes} of all packs; header digest, holes, alignment, zeros and ids checked."""
    tensors: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.safetensors")):
        whole = path.read_bytes()
        end = 8 + struct.unpack("<Q", whole[:8])[0]
        start = whole.index(b'"thaw.header":"b3:') + len(b'"thaw.header":"b3:')
        zeroed = whole[:start] + b"0" * 64 + whole[start + 64 : end]
        assert b3(zeroed) == "b3:" + whole[start : start + 64].decode()
        header = json.loads(whole[8:end])
        metadata = header.pop("__metadata__")
        assert metadata["thaw.format"] == "1"
        cursor = 0
        for name, tensor in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
            begin, stop = tensor["data_offsets"]
            assert begin == cursor
            data = whole[end + begin : end + stop]
            if name.startswith("__pad_"):
                assert not any(data)
            else:
                assert (end + begin) % (4096 if len(data) >= 1 << 20 else 64) == 0
                assert b3(data) == name.removeprefix("object ")
                tensors[name] = data
            cursor = stop
        assert end + cursor == len(whole)
    return tensors


def read_refs(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    refs = json.loads(data)
    assert b3(data.replace(refs["digest"].encode(), b"b3:" + b"0" * 64, 1)) == refs["digest"]
    return refs


class Reader:
    """Follows ids through the packs."""

    def __init__(self, repository: Path) -> None:
        self.tensors = read_packs(repository / "packs")

    def get(self, identifier: str, kind: str) -> dict[str, Any]:
        data = self.tensors[f"object {identifier}"]
        value = json.loads(data)
        assert rfc8785.dumps(value) == data
        assert value["type"] in {
            f"thaw.{kind}/1",
            *([f"thaw.{kind}/2"] if kind in ("turn", "model", "segment", "commit", "state") else []),
        }
        return value

    def tokens(self, state: dict[str, Any], namespace: str = "") -> list[int]:
        """All tokens; prefix hashes and the sizes of KV are checked on the way."""
        groups = self.get(state["model"], "model")["groups"]
        root = root_of(state, namespace)
        tokens: list[int] = []
        states: set[int] = set()
        for node in state["nodes"]:
            for entry in self.get(node, "segments")["entries"]:
                segment = self.get(entry["segment"], "segment")
                assert entry["start"] == segment["start"] == len(tokens)
                assert segment["window"] == prefix_hash(root, tokens[: len(tokens) // 256 * 256])
                assert segment["prefix"] == prefix_hash(root, tokens + segment["tokens"])
                tokens += segment["tokens"][: entry["length"]]
                states |= self.check_blobs(segment, groups)
        assert len(tokens) == state["num_kv"]
        assert state["num_kv"] in states or all(group["kind"] != "point" for group in groups)
        return tokens + state["tail_tokens"]

    def check_blobs(self, segment: dict[str, Any], groups: list[dict[str, Any]]) -> set[int]:
        """Their number and sizes; the tokens that it keeps states of."""
        assert (segment["type"] == "thaw.segment/2") == bool(segment.get("first") or segment.get("points"))
        end = segment["start"] + len(segment["tokens"])
        for group in groups:
            if group["kind"] != "point" and (blobs := segment["blobs"].get(group["name"])) is not None:
                count = end - segment.get("first", {}).get(group["name"], segment["start"])
                number, nbytes = token_blobs(group)
                assert [len(self.tensors[blob]) for blob in blobs] == [nbytes * count] * number
            else:
                assert "window" in group or group["kind"] == "point"
        for point in segment.get("points", []):
            assert segment["start"] < point["token"] <= end
            for group in (group for group in groups if group["kind"] == "point"):
                sizes = [len(self.tensors[blob]) for blob in point["blobs"][group["name"]]]
                assert sizes == state_blobs(group)
        return {point["token"] for point in segment.get("points", [])}


def token_blobs(group: dict[str, Any]) -> tuple[int, int]:
    """How many blobs a segment has of a group, and the bytes of a token in one."""
    size = DTYPES[group["dtype"]]
    if group["kind"] == "latent":
        return 1, group["num_layers"] * group["width"] * size
    both = group["head_dim"] + group.get("value_dim", group["head_dim"])
    return group["num_kv_heads"], group["num_layers"] * both * size


def state_blobs(group: dict[str, Any]) -> list[int]:
    """The bytes of each blob of a point state."""
    return [
        group["num_layers"] * math.prod(part["shape"]) * DTYPES[part["dtype"]]
        for part in group["parts"]
        for _ in range(part["num_heads"])
    ]


def root_of(state: dict[str, Any], namespace: str) -> bytes:
    if "kv_ranges" in state:
        assert state["type"] == "thaw.state/2"
        ends = [0, *(one["end"] for one in state["kv_ranges"])]
        assert [one["start"] for one in state["kv_ranges"]] == ends[:-1] and ends[-1] == state["num_kv"]
        return b"thaw.prefix/3\0" + f"{namespace}\0{state['salt']}".encode()
    model = state["model"]
    return b"thaw.prefix/2\0" + f"{model}\0{namespace}".encode() if namespace else b"thaw.prefix/1\0" + model.encode()


def prefix_hash(root: bytes, tokens: list[int]) -> str:
    chain = b3(root)
    for start in range(0, len(tokens), 256):
        window = tokens[start : start + 256]
        chain = b3(chain.encode() + struct.pack(f"<{len(window)}I", *window))
    return chain


@pytest.mark.parametrize("repository", [*FORMATS, HERE / "groups"], ids=lambda path: path.name)
def test_a_reader_written_from_the_page_reads_every_commit(repository: Path) -> None:
    reader = Reader(repository)
    refs = read_refs(repository / "refs.json")
    pending = [ref["target"] for ref in refs["refs"]]
    seen: set[str] = set()
    while pending:
        one = pending.pop()
        if one in seen:
            continue
        seen.add(one)
        commit = reader.get(one, "commit")
        pending += commit["parents"]
        state = reader.get(commit["state"], "state")
        assert len(reader.tokens(state)) == state["num_tokens"]
        turns = [turn for node in state["turn_nodes"] for turn in reader.get(node, "turns")["entries"]]
        assert len(turns) == state["num_turns"]
        check_messages(reader.get(turns[0], "turn"))
        assert int(reader.get(turns[1], "turn")["seed"]) == 2**64 - 1
        if state["boundary"] is not None:
            assert b3(reader.tensors[state["boundary"]["hidden"]]) == state["boundary"]["hidden"]
    assert len(seen) == (2 if repository.name == "groups" else 3)


def test_a_reader_written_from_the_page_reads_every_namespace() -> None:
    reader, refs = Reader(HERE / "namespaces"), read_refs(HERE / "namespaces" / "refs.json")
    assert refs["type"] == "thaw.refs/2" and refs["settings"]["user.namespaces.head.bolt"] == "side"
    found = {}
    for ref in refs["refs"]:
        namespace, _, name = ref["name"].removeprefix("@").partition("/") if ref["name"][0] == "@" else ("", "", "main")
        commit = reader.get(ref["target"], "commit")
        assert commit["type"] == f"thaw.commit/{2 if namespace else 1}" and commit.get("namespace", "") == namespace
        state = reader.get(commit["state"], "state")
        found[namespace, name] = len(reader.tokens(state, namespace))
    assert found == {("", "main"): 300, ("acme", "main"): 308, ("acme", "v1"): 300, ("bolt", "side"): 300}


def test_a_reader_written_from_the_page_reads_which_policy_computed_which_kv() -> None:
    reader, refs = Reader(HERE / "stale"), read_refs(HERE / "stale" / "refs.json")
    one, found = refs["refs"][0]["target"], []
    while one:
        commit = reader.get(one, "commit")
        state = reader.get(commit["state"], "state")
        assert len(reader.tokens(state)) == state["num_tokens"]
        ranges = state.get("kv_ranges", [])
        model = reader.get(state["model"], "model")
        assert all(set(part) == {"start", "end", "policy", "weights"} for part in ranges)
        assert not ranges or any(
            (part["policy"], part["weights"]) != (model["policy"], model["weights"]) for part in ranges
        )
        found.append([part["policy"] for part in ranges])
        one = next(iter(commit["parents"]), None)
    assert found == [["0", "1", "2"], ["0", "1"], []]


def check_messages(turn: dict[str, Any]) -> None:
    assert ("chat" in turn) == (turn["type"] == "thaw.turn/2")
    if "chat" in turn:
        chat = turn["chat"]
        assert chat["begin"] <= turn["start"] and turn["kind"] == "prompt"
        assert [json.loads(message)["role"] for message in chat["messages"]] == ["system", "user"]
        assert json.loads(chat["settings"]["variables"]["enable_thinking"]) is False


COLUMNS = {
    1: {
        "settings": ("key", "value"),
        "refs": ("name", "kind", "target"),
        "reflog": ("name", "kind", "old", "new", "reason", "time_ns", "moved"),
    },
    2: {
        "settings": ("key", "value"),
        "refs": ("name", "kind", "target"),
        "reflog": ("seq", "before", "name", "kind", "old", "new", "reason", "time_ns", "moved"),
        "reflog_ends": ("name", "seq"),
    },
}
COLUMNS[3] = COLUMNS[2]
CHECKED = {
    "packs": ("name", "nbytes", "doomed_ns"),
    "blobs": ("id", "pack", "start", "nbytes"),
    "objects": ("id", "kind", "pack", "start", "state"),
    "segments": ("window", "hex(key)", "segment", "state"),
}


@pytest.mark.parametrize("repository", [*FORMATS, HERE / "namespaces"], ids=lambda path: path.name)
def test_the_rows_of_the_database_are_as_the_page_says(repository: Path, tmp_path: Path) -> None:
    shutil.copy(repository / "thaw.db", tmp_path)
    connection = sqlite3.connect(tmp_path / "thaw.db")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    assert repository.name == {3: "namespaces"}.get(version, f"format-{version}")
    for table, columns in COLUMNS[version].items():
        for *row, checksum in connection.execute(f"SELECT {', '.join(columns)}, checksum FROM {table}"):
            assert b3(json.dumps([table, *row], separators=(",", ":")).encode())[3:35] == checksum
    if version > 1:
        check_rows(connection, Reader(repository))
    packs = {pack.name: pack.read_bytes() for pack in (repository / "packs").iterdir()}
    for identifier, pack, start, nbytes in connection.execute("SELECT id, pack, start, nbytes FROM blobs"):
        assert b3(packs[pack][start : start + nbytes]) == identifier
    for identifier, data, pack, start in connection.execute("SELECT id, data, pack, start FROM objects"):
        assert b3(data) == identifier and packs[pack][start : start + len(data)] == data
    connection.close()


def check_rows(connection: sqlite3.Connection, reader: Reader) -> None:
    for table, columns in CHECKED.items():
        for *row, check in connection.execute(f'SELECT {", ".join(columns)}, "check" FROM {table}'):
            if table == "segments":
                row[1] = row[1].lower()
            assert int(b3(json.dumps([table, *row], separators=(",", ":")).encode())[3:15], 16) == check
    settings = dict(connection.execute("SELECT key, value FROM settings"))
    rows = connection.execute("SELECT seq, before, name FROM reflog ORDER BY seq").fetchall()
    assert [row[0] for row in rows] == list(range(1, int(settings["moves"]) + 1))
    ends: dict[str, int] = {}
    for seq, before, name in rows:
        assert before == ends.get(name, 0)
        ends[name] = seq
    assert dict(connection.execute("SELECT name, seq FROM reflog_ends")) == ends
    assert connection.execute("SELECT count(*) FROM refs").fetchone() == (int(settings["refs"]),)
    commits = [reader.get(one, "commit") for (one,) in connection.execute("SELECT id FROM objects WHERE state NOTNULL")]
    whose = {commit["state"]: commit.get("namespace", "") for commit in commits}
    for window, key, segment, state in connection.execute('SELECT "window", "key", segment, state FROM segments'):
        of = reader.get(segment, "segment")
        start = of["start"] // 256 * 256
        tokens = reader.tokens(reader.get(state, "state"), whose[state])[start : start + 256]
        assert window == of["window"] and key == struct.pack(f">{len(tokens)}I", *tokens)
    for identifier, kind, state in connection.execute("SELECT id, kind, state FROM objects"):
        assert state == (reader.get(identifier, "commit")["state"] if kind == "commit" else None)


def test_draws_are_as_the_page_says() -> None:
    from thaw.core.sampling import derive, uniform

    def h(domain: bytes, *numbers: int) -> int:
        data = domain + b"".join(struct.pack("<Q", number) for number in numbers)
        return struct.unpack("<Q", blake3(data).digest()[:8])[0]

    for seed, position in ((0, 0), (2**64 - 1, 17), (5, 2**24)):
        assert uniform(seed, position) == (h(b"thaw.uniform/1", seed, position) >> 11) * 2.0**-53
        assert derive(seed, position, 3) == h(b"thaw.derive/1", seed, position, 3)
