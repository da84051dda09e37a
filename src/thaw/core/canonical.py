"""Canonical JSON (RFC 8785) of the object structs, and the checked way back.

Encoding is a pure function of the value, so an object's id is the hash of these bytes. Decoding trusts nothing:
size first, then UTF-8 JSON, then the schema, then that encoding again gives the same bytes.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import msgspec
import rfc8785

from thaw.core.errors import CorruptBlob, InvalidRequest, NewerFormat

MAX_OBJECT_BYTES = 16 * 1024 * 1024
NEWEST = {"thaw.turn": 2, "thaw.model": 2, "thaw.segment": 2, "thaw.commit": 2, "thaw.state": 2}
"""The newest version of each type of object that is not still at its first."""
T = TypeVar("T")


class U64(int):
    """An integer of up to 64 bits. JSON numbers hold 53, so it travels as a decimal string."""


def _enc_hook(value: Any) -> Any:
    if isinstance(value, U64):
        return str(int(value))
    raise NotImplementedError(f"cannot write {type(value).__name__} in canonical JSON")


def _dec_hook(kind: type, value: Any) -> Any:
    if kind is U64 and isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        number = int(value)
        if number < 1 << 64 and str(number) == value:
            return U64(number)
    raise ValueError(f"expected a 64-bit integer as a decimal string, got {str(value)[:40]!r}")


def to_plain(value: Any) -> Any:
    """`value` as dicts, lists, strings, numbers: what goes into JSON."""
    return msgspec.to_builtins(value, enc_hook=_enc_hook)


_plain: set[type] = set()


def declare_plain(*kinds: type) -> None:
    """Say that no float and no non-ASCII key can stand in these structs: msgspec's sorted JSON then *is* RFC 8785, and
    many times faster (a test holds the two together)."""
    _plain.update(kinds)


def encode(value: Any) -> bytes:
    """The canonical bytes of a struct. Raises `InvalidRequest` for what JSON cannot hold: half a character, NaN."""
    try:
        return _encode(value)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError) as error:
        raise InvalidRequest(f"{type(value).__name__}: {error}; it cannot be written as JSON") from None


def _encode(value: Any) -> bytes:
    if type(value) in _plain:
        return msgspec.json.encode(value, enc_hook=_enc_hook, order="sorted")
    return rfc8785.dumps(to_plain(value))


def decode(data: bytes | memoryview, kind: type[T], what: str = "object") -> T:
    """The struct in `data`. Raises `CorruptBlob` for anything that `encode` would not have written."""
    if len(data) > MAX_OBJECT_BYTES:
        raise CorruptBlob(f"{what}: {len(data)} bytes; an object has at most {MAX_OBJECT_BYTES}")
    try:
        value = decode_stored(data, kind, what)
        again = _encode(value)
    except (msgspec.DecodeError, ValueError, RecursionError, rfc8785.CanonicalizationError) as error:
        refuse_newer(data, what)
        raise CorruptBlob(f"{what}: {error}") from None
    if again != bytes(data):
        raise CorruptBlob(f"{what}: the bytes are not canonical JSON (RFC 8785)")
    return value


_ready: set[Any] = set()
_preparing = threading.Lock()


def prepare(kind: Any) -> None:
    """Lets msgspec work out a type before values of it are read: 0.22 crashes where two threads do so at once."""
    if kind not in _ready:
        with _preparing:
            msgspec.json.Decoder(kind, dec_hook=_dec_hook)
            _ready.add(kind)


def decode_stored(data: bytes | memoryview, kind: type[T], what: str = "an object") -> T:
    """The struct in bytes that hash to their name, and so are what was stored. For who looks at thousands: that they
    are canonical is not checked again. Raises `msgspec.DecodeError`, `NewerFormat`."""
    prepare(kind)
    try:
        return msgspec.json.decode(data, type=kind, dec_hook=_dec_hook)
    except msgspec.DecodeError:
        refuse_newer(data, what)
        raise


def refuse_newer(data: bytes | memoryview, what: str) -> None:
    """Raise `NewerFormat` when `data` says `"type": "thaw.x/N"` with an N above ours."""
    try:
        head = msgspec.json.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return
    name = head.get("type") if isinstance(head, dict) else None
    if isinstance(name, str) and name.startswith("thaw.") and name[-1:].isdigit():
        kind, _, version = name.rpartition("/")
        if version.isascii() and version.isdigit() and len(version) < 9 and int(version) > NEWEST.get(kind, 1):
            raise NewerFormat(f"{what} is a {name[:60]}: written by a newer thaw. Upgrade thaw to read it.")
