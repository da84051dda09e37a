"""A node's packs: folders by store, sent to other nodes and fetched from them.

What arrives is written under a temporary name and hashed on the way; it is there whole under its own name, every blob
with the content that names it, or not at all. A folder of the node's own is a cache, for the client's node has every
pack: the least recently used go when it grows too large. Folders that the pool gave are its own to look after.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
from blake3 import blake3

from thaw.cluster.framing import read_into, send_frame
from thaw.cluster.messages import ENCODE, FetchPack, PackSource, PulledPacks, PullPacks, PushBegun, Reply, value_of
from thaw.cluster.nixl_agent import LandedBytes, NixlAgent
from thaw.cluster.peer import Peer, exchange
from thaw.cluster.tls import PoolTls, send_file
from thaw.core.errors import CorruptBlob, NotFound, StorageFailed, ThawError
from thaw.data.files import replacing, storage_errors
from thaw.data.header import Entry, PackHeader, header_length, parse
from thaw.data.tiers.base import MissingPack
from thaw.data.tiers.folder import open_file
from thaw.data.writer import check_pack_name

MAX_PACK_BYTES = 1 << 36
PIECE = 1 << 20
"""Bytes that are received, and hashed while the next are received, at a time."""
YOUNG_S = 60.0
"""A pack that was written or fetched so lately is not dropped for room: it may not have been copied or read yet."""
SILENT_S = 30.0
ReadInto = Callable[[memoryview], bool]
"""Fills a view with the next bytes; False where there are no more."""


@dataclass
class PackFolder:
    """`own`: made by the node, and removed with it."""

    path: Path
    own: bool


@dataclass
class Traffic:
    """Bytes of packs that went to and came from other nodes, by the other node's address, and what was refused.
    `pushed`: of what was sent, by NIXL."""

    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    pulls: int = 0
    refused: int = 0
    pushed: int = 0
    fallbacks: int = 0


class NodePacks:
    """Safe from any thread."""

    def __init__(
        self, folder: Path, secret: bytes, limit_nbytes: int, tls: PoolTls | None = None, nixl: NixlAgent | None = None
    ) -> None:
        self._folder, self._secret, self._limit, self._tls, self._nixl = folder, secret, limit_nbytes, tls, nixl
        self._stores: dict[str, PackFolder] = {}
        self._lock = threading.Lock()
        self._fetching: dict[tuple[str, str], threading.Lock] = {}
        self.traffic = Traffic()

    # -- folders

    def serve(self, uuid: str, folder: str | None) -> str:
        """Idempotent. The folder."""
        with self._lock:
            if folder is not None:
                self._stores[uuid] = PackFolder(Path(folder), own=False)
            elif uuid not in self._stores:
                path = self._folder / "stores" / check_pack_name(f"{uuid}.safetensors").removesuffix(".safetensors")
                with storage_errors(path, "make the node's folder"):
                    path.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._stores[uuid] = PackFolder(path, own=True)
            return str(self._stores[uuid].path)

    def _of(self, uuid: str) -> PackFolder:
        with self._lock:
            found = self._stores.get(uuid)
        if found is None:
            raise NotFound(f"no store {uuid[:40]} is kept on this node")
        return found

    def drop(self, uuid: str, names: tuple[str, ...]) -> None:
        folder = self._of(uuid)
        for name in names if folder.own else ():
            (folder.path / check_pack_name(name)).unlink(missing_ok=True)

    def forget(self, uuid: str) -> None:
        """Idempotent."""
        with self._lock:
            folder = self._stores.pop(uuid, None)
        if folder is not None and folder.own:
            shutil.rmtree(folder.path, ignore_errors=True)

    def nbytes(self) -> int:
        """In the node's own folders."""
        with self._lock:
            own = [folder.path for folder in self._stores.values() if folder.own]
        return sum(size for path in own for _, size, _ in _files(path))

    # -- out

    def send(self, sock: socket.socket, question: FetchPack) -> None:
        """The size, then the bytes. Raises before anything was sent: `MissingPack` and others; then `OSError`."""
        fd = open_file(self._of(question.uuid).path / check_pack_name(question.name))
        with open(fd, "rb") as file:
            nbytes = os.fstat(fd).st_size
            to = str(sock.getpeername()[0])
            sock.settimeout(SILENT_S)
            if self._nixl is None or question.landing is None:
                send_frame(sock, ENCODE(Reply(value=nbytes)))
                self._count(self.traffic.sent, to, send_file(sock, file, nbytes))
            else:
                send_frame(sock, ENCODE(Reply(value=PushBegun(nbytes=nbytes))))
                pushed = self._nixl.push(sock, file, nbytes, question.landing)
                self._count(self.traffic.sent, to, pushed)
                self.traffic.pushed += pushed

    def _count(self, counter: Counter[str], other: str, nbytes: int) -> None:
        with self._lock:
            counter[other] += nbytes

    # -- in

    def pull(self, question: PullPacks) -> PulledPacks:
        """See `PullPacks`. Raises `MissingPack` where no source has one, `CorruptBlob` for bytes that are not what
        names them, `StorageFailed` where no source answers."""
        began, by_source, num = time.perf_counter(), Counter[str](), 0
        folder = self._of(question.uuid)
        for name in question.names:
            check_pack_name(name)
            with self._one_at_a_time(question.uuid, name):
                if _is_here(folder.path / name):
                    continue
                source, nbytes = self._pull_one(folder.path / name, question)
                by_source[source] += nbytes
                num += 1
        if num and folder.own:
            self._make_room(set(question.names))
        seconds = time.perf_counter() - began if num else 0.0
        return PulledPacks(num_packs=num, nbytes=by_source.total(), seconds=seconds, by_source=dict(by_source))

    def _pull_one(self, path: Path, question: PullPacks) -> tuple[str, int]:
        """From the first source that has it whole; its key, and bytes."""
        errors: list[ThawError] = []
        for source in question.sources:
            try:
                return source.key, self._fetch(path, question.uuid, source)
            except (CorruptBlob, StorageFailed) as error:  # MissingPack is a CorruptBlob
                errors.append(error)
            except OSError as error:
                errors.append(
                    StorageFailed(f"the node at {source.host}:{source.port} did not send {path.name}: {error}")
                )
        found = [error for error in errors if not isinstance(error, MissingPack)]
        raise (found or errors or [MissingPack(f"no node has the pack {path.name}")])[0]

    def _fetch(self, path: Path, uuid: str, source: PackSource) -> int:
        """By NIXL where there is some; where that fails, over the connection."""
        if self._nixl is not None:
            try:
                with self._nixl.landing() as landed:
                    return self._receive(path, uuid, source, landed)
            except MissingPack:
                raise
            except (OSError, CorruptBlob):
                self.traffic.fallbacks += 1
        return self._receive(path, uuid, source, None)

    def _receive(self, path: Path, uuid: str, source: PackSource, landed: LandedBytes | None) -> int:
        with Peer(source.host, source.port, self._secret, self._tls).connected() as sock:
            sock.settimeout(SILENT_S)
            landing = None if landed is None else landed.landing
            said = value_of(exchange(sock, ENCODE(FetchPack(uuid=uuid, name=path.name, landing=landing))))
            pushed = landed is not None and isinstance(said, dict)
            nbytes = msgspec.convert(said, PushBegun).nbytes if pushed else said
            if not isinstance(nbytes, int) or not 8 < nbytes <= MAX_PACK_BYTES:
                raise CorruptBlob(
                    f"{path.name} was announced with {nbytes!r} bytes; at most {MAX_PACK_BYTES} are taken"
                )
            read = landed.reader(sock) if landed is not None and pushed else partial(read_into, sock)
            with replacing(path, overwrite=False) as fd:
                try:
                    receive_pack(read, fd, nbytes, f"pack {path.name} from {source.host}")
                except CorruptBlob:
                    self.traffic.refused += 1
                    raise
            self._count(self.traffic.received, source.host, nbytes)
            self.traffic.pulls += 1
            return nbytes

    @contextlib.contextmanager
    def _one_at_a_time(self, uuid: str, name: str) -> Iterator[None]:
        """Two that need the same pack fetch it once."""
        with self._lock:
            lock = self._fetching.setdefault((uuid, name), threading.Lock())
        with lock:
            yield
        with self._lock:
            self._fetching.pop((uuid, name), None)

    def _make_room(self, needed: set[str]) -> None:
        with self._lock:
            own = [folder.path for folder in self._stores.values() if folder.own]
        found = sorted((used, size, path) for folder in own for path, size, used in _files(folder))
        over = sum(size for _, size, _ in found) - self._limit
        for used, size, path in found:
            if over <= 0 or time.time() - used < YOUNG_S:
                return
            if path.name not in needed:
                path.unlink(missing_ok=True)
                over -= size


def _is_here(path: Path) -> bool:
    """Noting the use of one that is."""
    with contextlib.suppress(OSError):
        os.utime(path)
    return path.exists()


def _files(folder: Path) -> list[tuple[Path, int, float]]:
    """Packs with size and time of last use."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                if entry.name.endswith(".safetensors"):
                    status = entry.stat(follow_symlinks=False)
                    found.append((Path(entry.path), status.st_size, status.st_mtime))
    return found


def receive_pack(read: ReadInto, fd: int, nbytes: int, what: str) -> PackHeader:
    """A pack's `nbytes` into the file, hashed behind the receiving. Raises `CorruptBlob` for a header
    that is none and for a blob that is not what names it, `OSError`. On an error the file holds anything."""
    os.posix_fallocate(fd, 0, nbytes)  # a full disk is an error here, and not a signal at the first touch of a page
    view = memoryview(mmap.mmap(fd, nbytes))  # let go of with the last piece of it, which an error may hold for a while
    _fill(read, view[:8], what)
    length = header_length(bytes(view[:8]), nbytes, what)
    _fill(read, view[8:length], what)
    header = parse(bytes(view[:length]), nbytes, what)
    with ThreadPoolExecutor(1, thread_name_prefix="thaw-hash") as hasher:
        _receive_blobs(read, view, header, hasher, what)
    return header


def _receive_blobs(read: ReadInto, view: memoryview, header: PackHeader, hasher: ThreadPoolExecutor, what: str) -> None:
    checks: list[Future[None]] = []
    state = blake3()
    for entry in header.entries:
        end = entry.offset + entry.nbytes
        for begin in range(entry.offset, end, PIECE):
            piece = view[begin : min(begin + PIECE, end)]
            _fill(read, piece, what)
            if not entry.is_pad:
                checks.append(hasher.submit(_hash, entry, begin, piece, state, what))
        while checks and checks[0].done():
            checks.pop(0).result()
    for check in checks:
        check.result()


def _hash(entry: Entry, begin: int, piece: memoryview, state: blake3, what: str) -> None:
    """Pieces come in order, on one thread."""
    if begin == entry.offset:
        state.reset()
    state.update(piece)
    if begin + len(piece) == entry.offset + entry.nbytes and (found := "b3:" + state.hexdigest()) != entry.id:
        raise CorruptBlob(f"{what}: the blob at byte {entry.offset} should be {entry.id}, and what came is {found}")


def _fill(read: ReadInto, view: memoryview, what: str) -> None:
    if not read(view):
        raise ConnectionResetError(f"{what} was cut off")
