"""Which changes of code that a receipt covers were moves, and so leave it fresh: receipts/moves.json.

Each entry is a commit: its subject, and for each covered path the digest (`code_digest.py`) before and after. A receipt
stands if the digest in it leads to the present one along entries. `record_moves.py` writes and checks them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from code_digest import LENGTH
from thaw.core.ids import digest

FILE = "receipts/moves.json"
EMPTY = digest(f"__init__.py {digest(b'Module()')}".encode())[:LENGTH]
"""The digest of a package without code, as which a folder that `covers` has gained or lost counts."""


class Move(msgspec.Struct, frozen=True):
    subject: str
    paths: dict[str, tuple[str, str]]


class Moves(msgspec.Struct, frozen=True):
    """Oldest first."""

    moves: tuple[Move, ...] = ()


def read(root: Path) -> tuple[Move, ...]:
    """Raises `msgspec.DecodeError` where the file is not of that form."""
    path = root / FILE
    return msgspec.json.decode(path.read_bytes(), type=Moves).moves if path.exists() else ()


def write(root: Path, moves: Sequence[Move]) -> None:
    (root / FILE).write_bytes(msgspec.json.format(msgspec.json.encode(Moves(tuple(moves))), indent=1) + b"\n")


def leads(path: str, before: str, after: str, moves: Sequence[Move]) -> bool:
    """Whether code at `path` that had the digest `before` only moved to have `after`."""
    found, left = {before}, [before]
    while left:
        old = left.pop()
        steps = (move.paths[path] for move in moves if path in move.paths)
        new = {step[1] for step in steps if step[0] == old} - found
        found |= new
        left += new
    return after in found


def earlier(now: Mapping[str, str], moves: Sequence[Move]) -> Iterator[dict[str, str]]:
    """The digests by path as they are, then as they were before the newest move, and so on."""
    was = dict(now)
    yield dict(was)
    for move in reversed(moves):
        undone = {path: old for path, (old, new) in move.paths.items() if was.get(path) == new}
        if undone:
            was |= undone
            yield dict(was)
