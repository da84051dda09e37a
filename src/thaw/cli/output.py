"""Where a verb's words go: a terminal, a pipe, or JSON.

Data goes to stdout, everything about the work (progress, hints, errors) to stderr. Colour only on a terminal, never
with NO_COLOR or TERM=dumb; a pipe gets the same words without it. Text that a model wrote is stripped of control
characters before it reaches a terminal. No `rich` here: what this draws must be there in a few milliseconds.
"""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any, TextIO

from thaw.core.text import clean as clean
from thaw.core.text import one_line as one_line

if TYPE_CHECKING:
    from pathlib import Path

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36"}
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
MAX_WIDTH = 120


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def has_colour(stream: TextIO) -> bool:
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def width() -> int:
    """Columns to write in: the terminal's, and 100 in a pipe."""
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return 100
    import shutil  # with its archive formats: only for those who draw

    return max(40, min(shutil.get_terminal_size().columns, MAX_WIDTH))


def has_unicode(stream: TextIO | None = None) -> bool:
    """Whether the stream takes box drawing; else ASCII is drawn."""
    return "utf" in ((stream or sys.stdout).encoding or "").lower()


def style(text: str, *names: str, stream: TextIO | None = None) -> str:
    """`text` in these colours where the stream (stdout) shows them."""
    if not text or not has_colour(stream or sys.stdout):
        return text
    return f"\x1b[{';'.join(_CODES[name] for name in names)}m{text}\x1b[0m"


def seen(text: str) -> int:
    """How many columns styled text takes."""
    return len(_ESCAPES.sub("", text))


def fold(text: str, room: int) -> list[str]:
    """Lines of at most `room` columns, broken at single spaces; words stay whole, styles in place."""
    lines = []
    for part in text.split("\n"):
        current = ""
        for word in part.split(" "):
            if current and seen(current) + 1 + seen(word) > room:
                lines.append(current)
                current = word
            else:
                current = f"{current} {word}" if current else word
        lines.append(current)
    return lines


def line(text: str = "") -> None:
    """One line of data on stdout; what the encoding cannot hold is replaced."""
    write(text + "\n")


def write(text: str, *, flush: bool = False) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding, "replace"))
    if flush:
        sys.stdout.flush()


def write_file(file: Path, data: bytes) -> None:
    """The file that a user named: it has the old bytes or these, after a crash too, and is for this user alone. What is
    no plain file (a device, a pipe, a link) is written into and stays what it is. Raises `StorageFailed`."""
    from thaw.data.files import storage_errors, write_atomic

    with storage_errors(file, "write"):
        if file.is_symlink() or (file.exists() and not file.is_file()):
            file.write_bytes(data)
            return
    write_atomic(file, data)


def note(text: str) -> None:
    """A line about the work, on stderr; on a terminal broken between words."""
    sys.stdout.flush()
    if is_terminal(sys.stderr):
        text = "\n".join(fold(text, width()))
    encoding = sys.stderr.encoding or "utf-8"
    sys.stderr.write(text.encode(encoding, "replace").decode(encoding, "replace") + "\n")
    sys.stderr.flush()


def say_error(message: str) -> None:
    note(f"{style('thaw:', 'bold', 'red', stream=sys.stderr)} {message}")


def print_json(value: Any) -> None:
    """One JSON document on stdout. Structs become objects, 64-bit integers strings; with a path that is not UTF-8 it is
    in ASCII, such bytes as `\\udc80` to `\\udcff`."""
    import msgspec

    from thaw.core.canonical import to_plain

    plain = to_plain(value)
    try:
        text = msgspec.json.format(msgspec.json.encode(plain), indent=2).decode()
    except UnicodeEncodeError:
        import json  # what msgspec refuses

        text = json.dumps(plain, indent=2)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def rows(table: list[tuple[str, ...]], *, indent: str = "", gap: str = "  ") -> None:
    """Left-aligned columns; the last one is as long as it is."""
    if not table:
        return
    widths = [max(seen(row[i]) for row in table) for i in range(len(table[0]) - 1)]
    for row in table:
        cells = [cell + " " * (wide - seen(cell)) for cell, wide in zip(row, widths, strict=False)]
        line(indent + gap.join([*cells, row[-1]]).rstrip())
