"""Reading receipts from anywhere. Size, depth and number syntax are checked before a value is made of the bytes.

Nothing but `thaw.core.errors` comes out, whatever the bytes are. A name that stands twice in an object is refused:
two readers could see two receipts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from thaw.core import canonical
from thaw.core.errors import CorruptBlob, InvalidRequest, NewerFormat, NotFound, StorageFailed
from thaw.receipt import compute
from thaw.receipt.format import MAX_BYTES, MAX_DEPTH, TYPE, Receipt

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | Mapping[str, Any]


def read(source: Source) -> Receipt:
    """The receipt in a file, in bytes, or in a dict as `json.loads` gives it; well-formed, its figures not yet checked.

    Raises `NotFound`, `StorageFailed`, `CorruptBlob` (not a receipt), `NewerFormat`.
    """
    plain = _to_json(source) if isinstance(source, Mapping) else _parse(_bytes(source))
    if not isinstance(plain, dict):
        raise CorruptBlob("the receipt is not a JSON object")
    _refuse_newer(plain.get("type"))
    try:
        canonical.prepare(Receipt)
        receipt = msgspec.convert(plain, Receipt)
        compute.digest_of(receipt)
        return receipt
    except (InvalidRequest, msgspec.ValidationError, ValueError, OverflowError, RecursionError) as error:
        raise CorruptBlob(f"this is not a receipt: {str(error)[:400]}") from None


def _bytes(source: str | os.PathLike[str] | bytes | bytearray | memoryview) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        if len(source) > MAX_BYTES:
            raise CorruptBlob(f"the receipt has {len(source)} bytes; at most {MAX_BYTES} are read")
        return bytes(source)
    path = Path(source)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(f"there is no receipt {path}") from None
    except (OSError, ValueError) as error:
        raise StorageFailed(f"cannot read the receipt {str(path)[:200]!r}: {error}") from None
    if len(data) > MAX_BYTES:
        raise CorruptBlob(f"{path} has more than {MAX_BYTES} bytes; no receipt is that long")
    return data


def _to_json(value: Mapping[str, Any]) -> Any:
    try:
        return _parse(json.dumps(dict(value), allow_nan=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise CorruptBlob(f"this is not a receipt: {str(error)[:200]}") from None


def _parse(data: bytes) -> Any:
    _check_depth(data)
    try:
        text = data.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise CorruptBlob(f"the receipt is not JSON: {str(error)[:200]}") from None


def _check_depth(data: bytes) -> None:
    """Refuse deep nesting before parsing; brackets inside strings do not count."""
    depth, inside, escaped = 0, False, False
    for byte in data:
        if inside:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                inside = False
        elif byte == 0x22:
            inside = True
        elif byte in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise CorruptBlob(f"the receipt is nested deeper than {MAX_DEPTH} levels")
        elif byte in b"]}":
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return out


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number here")
    return value


def _refuse_newer(kind: object) -> None:
    if not isinstance(kind, str) or kind == TYPE:
        return
    family, _, version = kind.rpartition("/")
    number = int(version) if version.isascii() and version.isdigit() and len(version) < 9 else 0
    if family == TYPE.rpartition("/")[0] and number > 1:
        raise NewerFormat(f"the receipt is a {kind}: written by a newer thaw. Upgrade thaw to check it.")
