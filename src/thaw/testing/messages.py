"""Messages that no client of thaw's sends, for engines that are reached over a network: each must be refused, with
"invalid-request" or "not-found", and cost nothing but itself. Nothing here is checked on its way to the engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import get_args

import msgspec

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
    "a version that is none": {"op": "stats", "id": _ONE, "v": True},
    "a megabyte for a version": {"op": "stats", "id": _ONE, "v": [1] * (1 << 19)},
    "a megabyte for an operation": {"op": "x" * (1 << 20), "id": _ONE},
    "a megabyte for a field": {"op": "stats", "id": _ONE, "x" * (1 << 20): 1},
    "half a character for an operation": {"op": "\ud800", "id": _ONE},
    "half a character for a field": {"op": "stats", "id": _ONE, "\ud800": 1},
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
    "a grammar that nobody asked for": {"op": "run", "id": _ONE, "record": _TWO, "grammar_from": 0},
    "tokens that are nobody's": {"op": "run", "id": _ONE, "record": _TWO, "num_kv": 19},
    "everybody's, without a grant": {"op": "unpin", "id": _ONE},
    "no record": {"op": "run", "id": _ONE},
    "no operation": {"id": _ONE},
    "nothing in it": {},
    "a list": [],
    "no message": "not a message",
    "an empty text": "",
    "a number": 0,
    "true": True,
}
MALFORMED = frozenset(HOSTILE) - {
    "a record that was guessed", "a record that was guessed, to pin", "a plan that was guessed",
    "a store that nobody registered", "a caller that nobody added", "everybody's, without a grant",
    "a grammar that nobody asked for",
}  # fmt: skip
"""Those that are no messages: refused wherever they are read. The others only by an engine that knows what it has."""
UNFIT = frozenset({"a grammar that nobody asked for"})
"""Those that do not fit what else the request asks for; a server may know that as soon as it reads them."""
MOST_SAID = 1000
"""An answer is no longer than so many characters, however long the message was."""

ODD: tuple[object, ...] = (
    None, True, 0, 1, -1, 19, 20, 21, 1 << 31, 1 << 40, (1 << 40) + 1, 1 << 63, 0.5, 1e308, "", "\ud800", "x" * 70_000,
    _THREE, [], [[]], [_THREE, _THREE], {},
)  # fmt: skip


_GOOD: dict[str, object] = {"record": _TWO, "store": _THREE, "packs": ["x"], "seconds": 1.0, "on": True}


def odd_messages() -> Iterator[dict[str, object]]:
    """Every kind of message, well formed but for one field, which has each of `ODD`; each has an id of its own. Some
    are sound after all: what an engine makes of one is its own affair, but it lives, and answers in words."""
    numbers = itertools.count(1)
    for kind in (protocol.Run, *get_args(protocol.Command)):
        fields = [field.name for field in msgspec.structs.fields(kind)]
        good = {name: _GOOD[name] for name in fields if name in _GOOD}
        for name, value in itertools.product(("op", *fields), ODD):
            yield {"op": kind.__struct_config__.tag, **good, "id": f"{next(numbers):032x}", name: value}
