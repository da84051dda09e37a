"""The header of a pack: how a safetensors file says what lies where.

    u64 little-endian: length N of the header | N bytes of JSON, padded with spaces | data

The JSON begins with `__metadata__`, whose first field `thaw.header` is the BLAKE3 of the first 8 + N bytes with that
digest's own 64 digits as zeros. A tensor is named by the hash of its bytes: `b3:…` a blob, `object b3:…` an object's
canonical JSON, `__pad_n` zeros for alignment. safetensors forbids holes, so pads are tensors. Blobs of 1 MiB and
more begin at multiples of 4 KiB of the file, others at multiples of 64 B.

Parsing trusts nothing: length against the file's size and a limit, digest, schema, names, sizes, no holes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec

from thaw.core.errors import CorruptBlob, NewerFormat
from thaw.core.ids import ID_LENGTH, digest, is_id

FORMAT = 1
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
BIG = 1 << 20
PAGE, LINE = 4096, 64
OBJECT, PAD = "object ", "__pad_"
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1}
_ENTRY = len('"":{"dtype":"","shape":[],"data_offsets":[,]},')
_HEAD = b'{"__metadata__":{"thaw.header":"b3:'
_DIGEST = slice(8 + len(_HEAD), 8 + len(_HEAD) + 64)


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor of a pack: bytes [offset, offset + nbytes) of the file. `id` is empty for a pad."""

    id: str
    is_object: bool
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_pad(self) -> bool:
        return not self.id


class PackHeader(msgspec.Struct, frozen=True, kw_only=True):
    """A checked header: entries in file order, without holes from `data_start` to `nbytes`, the file's size."""

    data_start: int
    nbytes: int
    entries: tuple[Entry, ...]
    metadata: dict[str, str]


class _Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)], ...], msgspec.Meta(max_length=8)]
    data_offsets: tuple[Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)], Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]]


_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_METADATA = msgspec.json.Decoder(dict[str, str])
_TENSOR = msgspec.json.Decoder(_Tensor)


def alignment(nbytes: int) -> int:
    return PAGE if nbytes >= BIG else LINE


def align(offset: int, nbytes: int) -> int:
    """The first offset at or after `offset` where a tensor of `nbytes` may begin."""
    step = alignment(nbytes)
    return -(-offset // step) * step


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int:
    nbytes = DTYPE_BYTES[dtype]
    for size in shape:
        nbytes *= size
    return nbytes


def _metadata(extra: Mapping[str, str]) -> dict[str, str]:
    return {"thaw.header": "b3:" + "0" * 64, "thaw.format": str(FORMAT), **extra}


def reserve(tensors: Sequence[tuple[str, str, tuple[int, ...], int]], extra: Mapping[str, str]) -> int:
    """Where data begins in a pack of these (name prefix, dtype, shape, nbytes): room for the longest header."""
    end = 0
    for _, _, _, nbytes in tensors:
        end = align(end, nbytes) + nbytes
    digits = len(str(end + PAGE * (len(tensors) + 1)))
    room = 8 + len(json.dumps({"__metadata__": _metadata(extra)}, separators=(",", ":")).encode())
    for prefix, dtype, shape, _ in tensors:
        sizes = ",".join(map(str, shape))
        room += len(prefix) + ID_LENGTH + len(dtype) + len(sizes) + 2 * digits + _ENTRY
        room += len(PAD) + digits + len("U8") + 4 + 2 * digits + _ENTRY
    big = any(nbytes >= BIG for *_, nbytes in tensors)
    step = PAGE if big else LINE
    return -(-room // step) * step


def build(entries: Sequence[Entry], data_start: int, extra: Mapping[str, str]) -> bytes:
    """The first `data_start` bytes of a pack with these entries (in file order, without holes)."""
    fields: dict[str, object] = {"__metadata__": _metadata(extra)}
    for number, entry in enumerate(entries):
        name = f"{PAD}{number}" if entry.is_pad else (OBJECT if entry.is_object else "") + entry.id
        begin = entry.offset - data_start
        fields[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, begin + entry.nbytes]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    assert text.startswith(_HEAD) and len(text) + 8 <= data_start and len(fields) == len(entries) + 1
    whole = bytearray((data_start - 8).to_bytes(8, "little") + text.ljust(data_start - 8))
    whole[_DIGEST] = digest(whole).removeprefix("b3:").encode()
    return bytes(whole)


def header_length(first: bytes, file_nbytes: int, what: str) -> int:
    """8 + N from the first 8 bytes, checked against the file's size and the limit before anything is allocated."""
    length = int.from_bytes(first, "little")
    if len(first) != 8 or length > file_nbytes - 8:
        raise CorruptBlob(f"{what}: {file_nbytes} bytes, too short for its header; it was cut off or overwritten")
    if length > MAX_HEADER_BYTES:
        raise CorruptBlob(f"{what}: a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
    return 8 + length


def parse(whole: bytes, file_nbytes: int, what: str, *, short: bool = False) -> PackHeader:
    """The header in `whole` (8 + N bytes). Raises `CorruptBlob` for anything `build` would not have written.

    With `short` the file may have been cut off behind its header; `nbytes` is what it should have.
    """
    _check_digest(whole, what)
    try:
        fields = _FIELDS.decode(whole[8:])
        metadata = _METADATA.decode(fields.pop("__metadata__"))
        tensors = {name: _TENSOR.decode(raw) for name, raw in fields.items()}
    except (msgspec.DecodeError, ValueError, RecursionError, KeyError) as error:
        raise CorruptBlob(f"{what}: its header is not what safetensors allows: {error}") from None
    if metadata.get("thaw.format") != str(FORMAT):
        version = metadata.get("thaw.format", "")[:20]
        raise NewerFormat(f"{what} has format {version!r}: written by a newer thaw. Upgrade thaw to read it.")
    entries = _entries(tensors, len(whole), what)
    nbytes = entries[-1].offset + entries[-1].nbytes if entries else len(whole)
    if nbytes != file_nbytes and not (short and file_nbytes < nbytes):
        raise CorruptBlob(f"{what}: {file_nbytes} bytes; its header describes {nbytes}: cut off or appended to")
    return PackHeader(data_start=len(whole), nbytes=nbytes, entries=entries, metadata=metadata)


def _check_digest(whole: bytes, what: str) -> None:
    zeroed = bytearray(whole)
    zeroed[_DIGEST] = b"0" * 64
    if not whole[8:].startswith(_HEAD) or whole[_DIGEST].decode("latin-1") != digest(zeroed)[3:]:
        raise CorruptBlob(f"{what}: its header does not match its own digest; it was changed after it was written")


def _entries(tensors: dict[str, _Tensor], data_start: int, what: str) -> tuple[Entry, ...]:
    entries = []
    cursor = data_start
    for name, tensor in sorted(tensors.items(), key=lambda pair: pair[1].data_offsets):
        begin, end = tensor.data_offsets
        if begin + data_start != cursor or end < begin:
            raise CorruptBlob(f"{what}: tensor {name[:80]!r} leaves a hole or overlaps another")
        if tensor.dtype not in DTYPE_BYTES or tensor_nbytes(tensor.dtype, tensor.shape) != end - begin:
            raise CorruptBlob(f"{what}: tensor {name[:80]!r} has {end - begin} bytes; dtype and shape say otherwise")
        entries.append(_entry(name, tensor, cursor, what))
        cursor = end + data_start
    return tuple(entries)


def _entry(name: str, tensor: _Tensor, offset: int, what: str) -> Entry:
    identifier = "" if name.startswith(PAD) else name.removeprefix(OBJECT)
    if identifier and not is_id(identifier):
        raise CorruptBlob(f"{what}: {name[:80]!r} is not the name of a blob, an object or a pad")
    begin, end = tensor.data_offsets
    return Entry(
        id=identifier, is_object=name.startswith(OBJECT), offset=offset, nbytes=end - begin,
        dtype=tensor.dtype, shape=tensor.shape,
    )  # fmt: skip
