"""What packs cost beside plain files: the same bytes, in the same run, the two arms alternating.

    write   `write_pack` (hashed, header, rename)       against   write of the same blobs and fsync
    read    `read_blobs` from a cold cache (hashed)     against   read of the same file from a cold cache

The cache is dropped with `posix_fadvise`. A share of 0.8 means: 80 % of the plain arm's throughput.
`python -m thaw.bench.io FOLDER` prints it.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from thaw.data.files import drop_cache
from thaw.data.locations import BlobLocation
from thaw.data.pack import PackItem, PackResult, read_blobs, write_pack


@dataclass(frozen=True)
class Arms:
    """MB/s of each round, ours and the plain arm's, and the median of the rounds' shares."""

    thaw: tuple[float, ...]
    plain: tuple[float, ...]

    @property
    def share(self) -> float:
        return statistics.median(a / b for a, b in zip(self.thaw, self.plain, strict=True))


@dataclass(frozen=True)
class IoReport:
    nbytes: int
    num_blobs: int
    write: Arms
    read: Arms

    def to_plain(self) -> dict[str, object]:
        return {**asdict(self), "write_share": self.write.share, "read_share": self.read.share}


def measure(folder: Path, *, num_blobs: int = 35, blob_nbytes: int = 2 << 20, rounds: int = 9) -> IoReport:
    """Runs both pairs `rounds` times in `folder` (after one round that is not counted); leaves nothing there."""
    source = [random.randbytes(blob_nbytes) for _ in range(num_blobs)]
    target = [bytearray(blob_nbytes) for _ in range(num_blobs)]
    times: dict[str, list[float]] = {name: [] for name in ("write", "plain write", "read", "plain read")}
    for number in range(rounds + 1):
        pack, plain = folder / f"bench-{os.getpid()}-{number}.safetensors", folder / f"bench-{os.getpid()}.plain"
        taken = _round(folder, pack, plain, source, target, plain_first=bool(number % 2))
        pack.unlink()
        plain.unlink()
        if number:
            for name, seconds in taken.items():
                times[name].append(seconds)
    nbytes = num_blobs * blob_nbytes
    speed = {name: tuple(nbytes / seconds / 1e6 for seconds in values) for name, values in times.items()}
    return IoReport(
        nbytes=nbytes,
        num_blobs=num_blobs,
        write=Arms(speed["write"], speed["plain write"]),
        read=Arms(speed["read"], speed["plain read"]),
    )


def _round(
    folder: Path, pack: Path, plain: Path, source: list[bytes], target: list[bytearray], *, plain_first: bool
) -> dict[str, float]:
    result: list[PackResult] = []
    taken: dict[str, float] = {}
    writes = {
        "write": lambda: result.append(_write(folder, pack.name, source)),
        "plain write": lambda: _plain_write(plain, source),
    }
    reads = {
        "read": lambda: _read(folder, result[0].blobs, target),
        "plain read": lambda: _plain_read(plain, target),
    }
    for arms in (writes, reads):
        for name in sorted(arms, key=lambda name: name.startswith("plain") is not plain_first):
            os.sync()
            began = time.perf_counter()
            arms[name]()
            taken[name] = time.perf_counter() - began
        drop_cache(pack)
        drop_cache(plain)
    return taken


def _write(folder: Path, name: str, source: list[bytes]) -> PackResult:
    items = [PackItem("", "U8", (len(data),), len(data), lambda data=data: data) for data in source]  # type: ignore[misc]
    return write_pack(folder, name, items)


def _plain_write(path: Path, source: list[bytes]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        for data in source:
            os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def _read(folder: Path, blobs: tuple[BlobLocation, ...], target: list[bytearray]) -> None:
    read_blobs(folder, [(place, memoryview(data)) for place, data in zip(blobs, target, strict=True)])


def _plain_read(path: Path, target: list[bytearray]) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        for number, data in enumerate(target):
            os.preadv(fd, [data], number * len(data))
    finally:
        os.close(fd)


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1] if len(sys.argv) > 1 else ".")).to_plain(), indent=1))
