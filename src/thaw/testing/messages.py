"""Messages that no client of thaw's sends, for engines that are reached over a network: each must be refused, with
"invalid-request" or "not-found", and cost nothing but itself. Nothing here is checked on its way to the engine."""

from __future__ import annotations

from thaw.engines.served import protocol

_ONE, _TWO, _THREE = "1" * 32, "2" * 32, "3" * 32
_WRITE: dict[str, object] = {"op": "write", "id": _ONE, "record": _TWO, "store": _THREE, "packs": ["x"]}
_FILL: dict[str, object] = {"op": "fill", "id": _ONE, "record": _TWO}

HOSTILE: dict[str, object] = {
    "a path for an id": {**_FILL, "id": "../../../../etc/passwd"},
    "a path to what is there": {**_FILL, "id": "../facts/s"},
    "a path for a record": {**_FILL, "record": "../" * 10 + "tmp"},
    "a path for a store": {**_WRITE, "store": "/tmp"},
    "a path for a pack": {**_WRITE, "packs": ["../x.safetensors"]},
    "a path that nobody asked for": {**_WRITE, "path": "/tmp"},
    "a record that was guessed": {"op": "run", "id": _ONE, "record": _TWO, "source": "4" * 32, "num_kv": 10},
    "a record that was guessed, to pin": {"op": "pin", "id": _ONE, "record": _TWO, "seconds": 1.0, "inband": True},
    "a plan that was guessed": {**_FILL, "inband": True},
    "a store that nobody registered": {**_WRITE, "inband": True},
    "an operation that is none": {"op": "no such thing", "id": _ONE},
    "another version": {"op": "stats", "id": _ONE, "v": 1},
    "too many records to drop": {"op": "stats", "id": _ONE, "drop": [_TWO] * (protocol.MAX_DROP + 1)},
    "too many packs": {**_WRITE, "packs": ["x"] * (protocol.MAX_RANKS + 1)},
    "a megabyte for a name": {**_FILL, "record": "2" * (1 << 20)},
    "a number out of range": {"op": "run", "id": _ONE, "record": _TWO, "num_kv": -1},
    "a line break after an id": {"op": "run", "id": _ONE + "\n", "record": _TWO},
    "a line break after a record": {"op": "run", "id": _ONE, "record": _TWO + "\n"},
    "a line break after a store": {**_WRITE, "store": _THREE + "\n"},
    "a line break after a pack": {**_WRITE, "packs": ["x\n"]},
    "a caller that nobody added": {"op": "run", "id": _ONE, "record": _TWO, "caller": "5" * 32},
    "a caller that is a path": {"op": "stats", "id": _ONE, "caller": "../facts/s"},
    "everybody's, without a grant": {"op": "unpin", "id": _ONE},
    "no record": {"op": "run", "id": _ONE},
    "no operation": {"id": _ONE},
    "nothing in it": {},
    "a list": [],
    "no message": "not a message",
}
MALFORMED = frozenset(HOSTILE) - {
    "a record that was guessed", "a record that was guessed, to pin", "a plan that was guessed",
    "a store that nobody registered", "a caller that nobody added", "everybody's, without a grant",
}  # fmt: skip
"""Those that are no messages: refused wherever they are read. The others only by an engine that knows what it has."""
