"""Reading packs for `fsck`: every byte of them is accounted for by the header's digest, a tensor's hash or zeros.

Works in constant memory, whatever a header claims, and never raises for damage: it describes it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from blake3 import blake3

from thaw.core.errors import CorruptBlob, ThawError
from thaw.data.files import storage_errors
from thaw.data.header import Entry, PackHeader
from thaw.data.pack import read_header
from thaw.data.tiers.folder import open_file

PIECE = 8 << 20
SUFFIX = ".safetensors"


@dataclass
class PackScan:
    """What a pack holds and what is wrong with it. `bad`: entries whose bytes are not there or not as written."""

    name: str
    header: PackHeader | None = None
    problems: list[str] = field(default_factory=list)
    bad: list[Entry] = field(default_factory=list)
    nbytes: int = 0

    def good(self) -> list[Entry]:
        """Blobs and objects that are as written (as far as was looked)."""
        bad = {(entry.id, entry.offset) for entry in self.bad}
        entries = self.header.entries if self.header else ()
        return [entry for entry in entries if not entry.is_pad and (entry.id, entry.offset) not in bad]


def list_packs(folder: Path) -> list[str]:
    """Names of pack files; nothing when the folder is gone."""
    with storage_errors(folder, "list"):
        return sorted(n for n in os.listdir(folder) if n.endswith(SUFFIX)) if folder.is_dir() else []


def look_at(folder: Path, name: str, nbytes: int) -> PackScan:
    """A scan that opens nothing: whether the file is there, and is `nbytes` long."""
    scan = PackScan(name)
    try:
        status = os.stat(folder / name)
    except OSError as error:
        scan.problems.append(f"pack {name} is missing or cannot be reached: {error.strerror}")
        return scan
    scan.nbytes = status.st_size
    if not stat.S_ISREG(status.st_mode):
        scan.problems.append(f"pack {name} is no file but a folder, a pipe or a device")
    elif status.st_size != nbytes:
        how = "was cut off" if status.st_size < nbytes else "was appended to"
        scan.problems.append(f"pack {name} {how}: {status.st_size} bytes are there, {nbytes} were written")
    return scan


def scan_packs(folder: Path, names: Iterable[str], *, deep: bool) -> dict[str, PackScan]:
    """Scans packs; `deep` hashes all bytes, else only headers and sizes are checked."""
    return {name: scan_pack(folder / name, deep=deep) for name in names}


def scan_pack(path: Path, *, deep: bool) -> PackScan:
    scan = PackScan(path.name)
    try:
        scan.header = read_header(path, short=True)
        scan.nbytes = path.stat().st_size
        _check_end(scan)
        if deep:
            _check_bytes(path, scan)
    except ThawError as error:
        scan.problems.append(str(error))
    except OSError as error:
        scan.problems.append(f"pack {path.name} cannot be read: {error.strerror}")
    return scan


def _check_end(scan: PackScan) -> None:
    assert scan.header is not None
    if scan.nbytes < scan.header.nbytes:
        scan.problems.append(
            f"pack {scan.name} was cut off: {scan.nbytes} bytes are there, its header describes {scan.header.nbytes}"
        )
        scan.bad += [entry for entry in scan.header.entries if entry.offset + entry.nbytes > scan.nbytes]


def _check_bytes(path: Path, scan: PackScan) -> None:
    assert scan.header is not None
    with PackFiles(path.parent) as files:
        for entry in scan.header.entries:
            what = files.damage(path.name, entry) if entry.offset + entry.nbytes <= scan.nbytes else ""
            if what:
                scan.problems.append(f"pack {path.name}: {what}")
                scan.bad.append(entry)


class PackFiles:
    """Packs that are read in order, one open at a time. Raises `MissingPack`, `StorageFailed`, `CorruptBlob`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._pack, self._fd = folder, "", -1

    def damage(self, pack: str, entry: Entry) -> str:
        """What is wrong with an entry's bytes, "" when nothing is."""
        return _damage(self._open(pack), entry)

    def read(self, pack: str, start: int, nbytes: int) -> bytes:
        """Bytes [start, start + nbytes), not verified. Raises `CorruptBlob` where the file ends before."""
        fd, data = self._open(pack), bytearray()
        while len(data) < nbytes:
            with storage_errors(self._folder / pack, "read"):
                piece = os.pread(fd, min(PIECE, nbytes - len(data)), start + len(data))
            if not piece:
                raise CorruptBlob(f"pack {pack} ended at byte {start + len(data)} while being read. Run `thaw fsck`.")
            data += piece
        return bytes(data)

    def _open(self, pack: str) -> int:
        if pack != self._pack:
            self._close()
            self._fd, self._pack = open_file(self._folder / pack), pack
        return self._fd

    def _close(self) -> None:
        if self._pack:
            os.close(self._fd)
        self._fd, self._pack = -1, ""

    def __enter__(self) -> PackFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


def _damage(fd: int, entry: Entry) -> str:
    hasher = blake3()
    zero = True
    for start in range(entry.offset, entry.offset + entry.nbytes, PIECE):
        try:
            piece = os.pread(fd, min(PIECE, entry.offset + entry.nbytes - start), start)
        except OSError as error:
            return f"{entry.id or 'a pad'} at byte {entry.offset} cannot be read: {error.strerror}"
        if entry.is_pad:
            zero = zero and not any(piece)
        else:
            hasher.update(piece)
    if entry.is_pad:
        return "" if zero else f"a pad at byte {entry.offset} is not zeros"
    found = "b3:" + hasher.hexdigest()
    kind = "object" if entry.is_object else "blob"
    return "" if found == entry.id else f"{kind} {entry.id} at byte {entry.offset} hashes to {found}"
