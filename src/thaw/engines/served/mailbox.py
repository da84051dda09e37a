"""The mail: a folder of the user's own in which engine and client leave each other short files.

It is 0700 whatever the umask, and so is every folder above it that thaw names; a path that another user of the host
could change is refused (`data.private`). It carries what requests cannot: answers to commands, hydrate plans on their
way in, entropies of sampled tokens, and the stores that the engine may write to. Both sides run as the
same user on one host, or share the folder; that is also what a store needs.

    stores/<uuid>          a store's mount, put there by the user's own client or the configuration
    plans/<id>             a hydrate plan
    grants/<id>            empty: the sender of the message of this id may change what all share
    callers/<name>         empty: messages that say this name are of a client that shares the folder
    adapters/<id>          a copy of an adapter that a client had the engine load, under the hash of its content
    entropies/<id>         of the tokens of a run, 8 bytes each; made by the client, filled by the first worker
    answers/<id>.<from>    an answer; <from> is "s" (scheduler) or a worker's rank
    commands/<id>          a command whose request the server's front end holds back, in an engine that looks for such
    facts/<from>           what a process says about itself
    facts/tight.<rank>     callers whose KV has little room left in a worker's arena; not there while all have much
    facts/lock             locked by the engine for as long as its process lives
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from thaw.core.canonical import prepare
from thaw.core.errors import Busy, CorruptBlob, EngineDied, InvalidRequest, NotFound, StorageFailed, ThawError
from thaw.data.files import read_own, storage_errors
from thaw.data.locations import StoreMount
from thaw.data.private import is_own, make_private
from thaw.engines.base import HydratePlan
from thaw.engines.served.budget import Caller, Room
from thaw.engines.served.protocol import Answer, EngineFacts, Message, WorkerFacts

log = logging.getLogger("thaw.served")
T = TypeVar("T")
SCHEDULER = "s"
STALE_S = 3600.0
"""Answers and plans older than this are swept: whoever asked is gone."""


CLAIM_LIMIT_S = 30.0
"""How long an engine waits for the one before it, which uses the same folder, to end."""
ROOT = "thaw-mail"
MAX_NBYTES = 1 << 30
"""Of one file; a plan of a million tokens has some 10 MB."""
_ENTROPY = struct.Struct("<d")


class Mailbox:
    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._make()

    def _make(self) -> None:
        """Raises `StorageFailed` for a folder that others could change."""
        try:
            for folder in _own_part(self.folder):
                make_private(folder, close=True)
            for name in ("", "stores", "plans", "answers", "facts", "grants", "callers", "entropies", "commands"):
                make_private(self.folder / name)
        except StorageFailed as error:
            raise StorageFailed(f"the mail folder {self.folder} cannot be used: {error}") from None

    # -- whose it is

    def claim(self) -> None:
        """The engine's own from now until its process ends, however it ends. Raises `Busy` when another one has it."""
        ends = time.monotonic() + CLAIM_LIMIT_S
        while True:
            self._make()
            path = self.folder / "facts" / "lock"
            _require_file(path)
            with storage_errors(path, "open"):
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
            if _lock(file):
                if path.exists() and path.stat().st_ino == os.fstat(file).st_ino:
                    return  # the file stays open as long as this process, and with it the lock
                os.close(file)  # somebody swept the folder of the engine before
                continue
            os.close(file)
            if time.monotonic() > ends:
                raise Busy(
                    f"another engine uses the mail folder {self.folder}: stop it, or start this one with another file "
                    "(`thaw engine config vllm` writes a folder of its own into each)"
                )
            time.sleep(0.1)

    def check_alive(self) -> None:
        """Raise `EngineDied` when the engine's process is gone."""
        facts = self.engine_facts()
        if facts is None or (facts.pid != os.getpid() and _is_free(self.folder / "facts" / "lock")):
            name = facts.engine if facts is not None else "the server"
            raise EngineDied(f"{name}'s engine died (its process is gone); start it again and hydrate from a commit")

    def remove(self) -> None:
        """For whoever started the engine, when it is gone: the whole folder, other data-parallel ranks' too."""
        ranked = self.folder.parent.parent.name == ROOT
        shutil.rmtree(self.folder.parent if ranked else self.folder, ignore_errors=True)

    @property
    def adapters(self) -> Path:
        """Where copies of adapters lie, each under its id; made by whoever has one loaded."""
        return self.folder / "adapters"

    # -- stores

    def register_store(self, mount: StoreMount) -> None:
        """Let the engine write to this store."""
        path, data = self.folder / "stores" / mount.uuid, msgspec.json.encode(mount)
        _require_file(path)
        if not path.exists() or _bytes(path) != data:
            _put(path, data)

    def mount(self, uuid: str) -> StoreMount:
        """The store's. Raises `NotFound` when nobody registered it."""
        try:
            return msgspec.json.decode(_bytes(self.folder / "stores" / uuid), type=StoreMount)
        except msgspec.MsgspecError as error:
            raise CorruptBlob(f"the mount of store {uuid} in the engine's mail is none: {error}") from None
        except OSError:
            raise NotFound(
                f"store {uuid} is not known to this engine: open the repository on the engine's host, or start the "
                "engine with it (thaw engine config vllm --store FOLDER)"
            ) from None

    # -- plans

    def put_plan(self, name: str, plan: HydratePlan) -> None:
        _put(self.folder / "plans" / name, msgspec.msgpack.encode(plan, enc_hook=str))

    def plan(self, name: str) -> HydratePlan:
        try:
            return _PLAN.decode(_bytes(self.folder / "plans" / name))
        except OSError:
            raise NotFound(f"no plan {name} in the engine's mail") from None
        except msgspec.MsgspecError as error:
            raise CorruptBlob(f"the plan {name} in the engine's mail is none: {error}") from None

    def drop_plan(self, name: str) -> None:
        _drop(self.folder / "plans" / name)

    # -- callers

    def add_caller(self, name: str) -> None:
        """Messages may say this name from now on."""
        _put(self.folder / "callers" / name, b"")

    def drop_caller(self, name: str) -> None:
        _drop(self.folder / "callers" / name)

    def require_caller(self, message: Message) -> None:
        """Raise `InvalidRequest` for a caller that nobody has added, and where the message needs one and has none."""
        name = type(message).__name__.lower()
        if message.caller is None:
            if message.for_sharers:
                raise InvalidRequest(
                    f"{name}: it is for those who share the engine's mail folder; use thaw's own client there, as the "
                    "same user"
                )
        elif not (self.folder / "callers" / message.caller).exists():
            raise InvalidRequest(
                f"{name}: its caller is not among those who share the engine's mail folder: attach anew, or leave "
                "`caller` out"
            )

    # -- grants

    def grant(self, name: str) -> None:
        """Let the engine do what the message of this id asks, though it is about everybody's sessions."""
        _put(self.folder / "grants" / name, b"")

    def require_granted(self, message: Message) -> None:
        """Raise `InvalidRequest` for a message for owners whose sender does not share this folder."""
        if message.for_owner and not (self.folder / "grants" / message.id).exists():
            raise InvalidRequest(
                f"{type(message).__name__.lower()}: it would change everybody's sessions, so it is for those who share "
                "the engine's mail folder; use thaw's own client there, as the same user"
            )

    # -- commands

    def leave_command(self, message: Message) -> None:
        """For the engine, which takes it out, where the request that carries it has not arrived by then."""
        _put(self.folder / "commands" / message.id, msgspec.json.encode(message))

    def withdraw_command(self, name: str) -> None:
        _drop(self.folder / "commands" / name)

    def take_commands(self) -> tuple[bytes, ...]:
        """Those that were left, as they were written; they are taken out. Never raises, for it stands in the engine's
        loop."""
        found = []
        with contextlib.suppress(OSError):
            for path in sorted((self.folder / "commands").iterdir()):
                if path.name.startswith("."):  # being written
                    continue
                with contextlib.suppress(OSError, ThawError):
                    found.append(_bytes(path))
                with contextlib.suppress(OSError):
                    path.unlink()
        return tuple(found)

    # -- answers

    def answer(self, name: str, sender: str | int, answer: Answer) -> None:
        """Never raises, for it stands in an engine's step: of what cannot be written the log alone hears."""
        path = self.folder / "answers" / f"{name}.{sender}"
        try:
            _put(path, msgspec.json.encode(answer))
        except StorageFailed as error:
            log.error("thaw: an answer is lost: %s", error)

    def peek(self, name: str, sender: str | int) -> Answer | None:
        """The answer if it is there; it stays."""
        try:
            return _ANSWER.decode(_bytes(self.folder / "answers" / f"{name}.{sender}"))
        except OSError:
            return None
        except msgspec.MsgspecError as error:
            raise CorruptBlob(f"the answer {name}.{sender} in the engine's mail is none: {error}") from None

    def take(self, name: str, sender: str | int) -> Answer | None:
        """The answer if it is there; it is taken out."""
        found = self.peek(name, sender)
        if found is not None:
            _drop(self.folder / "answers" / f"{name}.{sender}")
        return found

    # -- entropies

    def expect_entropies(self, name: str) -> None:
        """Let the engine put those of the run `name` here, until they are dropped."""
        _put(self.folder / "entropies" / name, b"")

    def put_entropy(self, name: str, index: int, value: float) -> None:
        """Of the run's token `index`; once more where it is sampled again. Never raises, for it stands in the middle of
        an engine's step: nothing happens where nobody expects it, and who misses one says so (`entropies`)."""
        with contextlib.suppress(OSError), (self.folder / "entropies" / name).open("r+b", buffering=0) as file:
            file.seek(index * _ENTROPY.size)
            file.write(_ENTROPY.pack(value))

    def entropies(self, name: str, start: int, count: int) -> tuple[float, ...]:
        """Of tokens [start, start + count) of the run, all of which have come. Raises `StorageFailed` where the engine
        has not put them here."""
        try:
            with (self.folder / "entropies" / name).open("rb") as file:
                file.seek(start * _ENTROPY.size)
                data = file.read(count * _ENTROPY.size)
        except OSError as error:
            raise StorageFailed(f"the entropies of a run cannot be read from the engine's mail: {error}") from None
        if len(data) < count * _ENTROPY.size:
            raise StorageFailed(
                f"the engine sent tokens up to {start + count} of a run, and entropies of {len(data) // _ENTROPY.size} "
                f"of the last {count}; is its mail folder {self.folder} full?"
            )
        return tuple(value for (value,) in _ENTROPY.iter_unpack(data))

    def drop_entropies(self, name: str) -> None:
        _drop(self.folder / "entropies" / name)

    # -- facts

    def post(self, sender: str | int, facts: WorkerFacts | EngineFacts) -> None:
        _put(self.folder / "facts" / str(sender), msgspec.json.encode(facts))

    def engine_facts(self) -> EngineFacts | None:
        return _read(self.folder / "facts" / SCHEDULER, EngineFacts)

    def worker_facts(self, rank: int) -> WorkerFacts | None:
        return _read(self.folder / "facts" / str(rank), WorkerFacts)

    def post_tight(self, rank: int, tight: Mapping[Caller, Room]) -> None:
        """Who has little room left in this worker's arena. Never raises: without it requests are refused later, when
        their KV cannot be kept."""
        path = self.folder / "facts" / f"tight.{rank}"
        try:
            if tight:
                _put(path, msgspec.json.encode(tight))
            else:
                _drop(path)
        except StorageFailed as error:
            log.error("thaw: who has little room is not told: %s", error)

    def tight(self, rank: int) -> dict[Caller, Room]:
        return _read(self.folder / "facts" / f"tight.{rank}", dict[Caller, Room]) or {}

    def sweep(self) -> None:
        """Remove what was never fetched."""
        limit = time.time() - STALE_S
        for name in ("plans", "answers", "grants", "entropies", "commands"):
            for path in (self.folder / name).iterdir():
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime < limit:
                        path.unlink()


def default_folder(name: str) -> Path:
    """A folder for the engine `name`, below the user's runtime folder, or in the temporary one where there is none."""
    base = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    root = base if base.is_absolute() and is_own(base) else Path("/tmp") / _of_user()
    return root / ROOT / name


def _of_user() -> str:
    return f"thaw-{os.getuid()}"


def _own_part(folder: Path) -> list[Path]:
    """Those of `folder` and what is above it that thaw names itself, the outermost first."""
    way = [*reversed(folder.parents), folder]
    first = next((i for i, place in enumerate(way) if place.name in (_of_user(), ROOT)), len(way))
    return way[first:]


def ranks_beside(folder: Path) -> list[int]:
    """The data-parallel ranks that run and have their folders beside `folder`, one of them."""
    found = [place for place in folder.parent.glob("dp*") if place.name[2:].isdecimal()]
    return sorted(int(place.name[2:]) for place in found if not _is_free(place / "facts" / "lock"))


def sweep_dead(own: Path) -> None:
    """Remove what dead engines left beside the folder `own`, where that is one of the usual place's."""
    if own.parent.name != ROOT or not own.parent.is_dir():
        return
    for folder in own.parent.iterdir():
        with contextlib.suppress(OSError):
            if folder != own and folder.stat().st_uid == os.getuid() and _is_dead(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_dead(folder: Path) -> bool:
    """Whether an engine had this folder and is gone. One that nobody has claimed yet may be about to start."""
    own = list(_facts_of(folder))
    if any(facts.pid == os.getpid() for facts, _ in own):
        return False  # looking at the lock of one's own process would open it
    if own and all(lock.exists() for _, lock in own):
        return all(_is_free(lock) for _, lock in own)
    return folder.stat().st_mtime < time.time() - STALE_S and not any(_runs(facts.pid) for facts, _ in own)


def _facts_of(folder: Path) -> Iterator[tuple[EngineFacts, Path]]:
    """What the engines of this folder (one, or one for each data-parallel rank) say, and their locks."""
    for place in (folder, *folder.glob("dp*")):
        facts = _read(place / "facts" / SCHEDULER, EngineFacts)
        if facts is not None:
            yield facts, place / "facts" / "lock"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _lock(file: int) -> bool:
    """POSIX's lock, not flock's: children that are forked do not inherit it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_free(path: Path) -> bool:
    """Whether nobody holds this lock. Not for a lock of this process: looking at it would open it."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return _lock(file)
    finally:
        os.close(file)


def _put(path: Path, data: bytes) -> None:
    """All at once or not at all; no fsync, for mail does not outlive its engine. Raises `StorageFailed`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    with storage_errors(path, "write"):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _drop(path: Path) -> None:
    """Whether or not it is there. Raises `StorageFailed`."""
    with storage_errors(path, "remove"):
        path.unlink(missing_ok=True)


def _bytes(path: Path) -> bytes:
    """Raises `CorruptBlob` for what is no file, `OSError`."""
    return read_own(path, MAX_NBYTES)


def _require_file(path: Path) -> None:
    """Raises `StorageFailed` for a folder, a link, a pipe or a socket in its place."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode):
        raise StorageFailed(f"{path} is no file but a folder, a link, a pipe or a socket: look into it, then remove it")


def _made(kind: Callable[[object], object], value: object) -> object:
    """What msgspec does not know by itself: 64-bit integers with a type of their own."""
    return kind(value)


_PLAN = msgspec.msgpack.Decoder(HydratePlan, dec_hook=_made)
_ANSWER = msgspec.json.Decoder(Answer)


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        prepare(kind)
        return msgspec.json.decode(_bytes(path), type=kind)
    except (OSError, msgspec.MsgspecError, CorruptBlob):
        return None
