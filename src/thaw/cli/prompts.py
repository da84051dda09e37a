"""What a verb is given to read: words on the command line, files, stdin, a JSONL file of prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

from thaw.core.errors import InvalidRequest, NotFound
from thaw.data.files import read_at_most

STDIN = "-"
MAX_BYTES = 64 << 20
"""The longest text that is read: some four bytes for each token that a session may have."""


def from_arguments(prompt: str | None, *, or_stdin: bool) -> str:
    """The prompt itself; `-` is stdin, and so is nothing at all when stdin is a pipe or file and `or_stdin`."""
    if prompt == STDIN or (prompt is None and or_stdin and not sys.stdin.isatty()):
        return _decode(read_at_most(sys.stdin.buffer, MAX_BYTES, "stdin"), "stdin")
    return prompt or ""


def from_file(name: str) -> str:
    """A text file; `-` is stdin."""
    return _decode(bytes_of(name, MAX_BYTES), "stdin" if name == STDIN else name)


def bytes_of(name: str, limit: int) -> bytes:
    """What is in a file, or in stdin (`-`). Raises `NotFound`, and `InvalidRequest` for more than `limit` bytes."""
    if name == STDIN:
        return read_at_most(sys.stdin.buffer, limit, "stdin")
    try:
        with Path(name).expanduser().open("rb") as file:
            return read_at_most(file, limit, name)
    except OSError as error:
        raise NotFound(f"{name} could not be read: {error.strerror}") from None


def from_jsonl(name: str) -> list[tuple[str, dict[str, Any]]]:
    """One prompt a line: a string, or an object with `prompt` and any sampling fields for that child alone."""
    out = [_line(name, i, text) for i, text in enumerate(from_file(name).splitlines(), 1) if text.strip()]
    if not out:
        raise InvalidRequest(f'{name} has no prompts; write one per line, as "text" or {{"prompt": "text", "seed": 1}}')
    return out


def _line(name: str, number: int, text: str) -> tuple[str, dict[str, Any]]:
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"{name}, line {number}: {error}. Each line is one JSON value.") from None
    if isinstance(value, str):
        return value, {}
    if isinstance(value, dict) and isinstance(value.get("prompt"), str):
        return value.pop("prompt"), value
    raise InvalidRequest(f'{name}, line {number}: expected a string or an object with "prompt", got {text[:60]}')


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name} is not UTF-8 text (byte {error.start}: {error.reason})") from None


def make_sampling(given: dict[str, Any], more: dict[str, Any] | None = None) -> Any:
    """`Sampling` with these fields. Raises `BadSampling` for a value, `InvalidRequest` for an unknown name."""
    from thaw.core.sampling import Sampling

    fields = {**given, **(more or {})}
    unknown = sorted(set(fields) - set(Sampling.__struct_fields__))
    if unknown:
        known = ", ".join(Sampling.__struct_fields__)
        raise InvalidRequest(f"{', '.join(unknown)}: not a sampling field; use prompt or one of {known}")
    return Sampling(**fields)
