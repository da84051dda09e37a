"""A store's tiers, in their order: a pack is read from the first that has it, and written into the first of all.

The names of packs are drawn at random or made of their content, so that a name means the same pack in every tier. A
tier is opened when it is asked for the first time: what an unused one lacks costs nothing. A tier that fails is an
error, and the next one is not asked: a slow detour would go unnoticed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType

from thaw.core.errors import InvalidRequest, StorageFailed, ThawError, Unsupported
from thaw.data.files import storage_failed
from thaw.data.locations import StoreMount, TierAddress
from thaw.data.tiers import open_tier
from thaw.data.tiers.base import MissingPack, NewPack, OpenPack, ReadExtents, WritePack


class Mounted:
    """What a mount names, to read from and to write to. Safe from any thread; nothing is left open between two uses."""

    def __init__(self, mount: StoreMount) -> None:
        if not mount.tiers:
            raise InvalidRequest(f"the mount of store {mount.uuid} names no tier; give at least one")
        self._tiers = mount.tiers

    def open_pack(self, name: str) -> OpenPack:
        """See `ReadExtents`. `MissingPack` where no tier has it."""
        missing = []
        for address in self._tiers:
            try:
                with _errors_of(address, "read"):
                    return _Reading(address, _open(address).open_pack(name))
            except MissingPack as error:
                missing.append(error)
        if len(missing) == 1:
            raise missing[0]
        where = ", ".join(address.url for address in self._tiers)
        raise MissingPack(
            f"pack {name} is in none of the store's tiers: {where}. Run `thaw fsck` to see what needs it."
        )

    def new_pack(self, name: str) -> AbstractContextManager[NewPack]:
        """See `WritePack`. Raises `Unsupported` where the first tier is only read."""
        first = self._tiers[0]
        tier = _open(first)
        if not isinstance(tier, WritePack):
            raise Unsupported(f"packs cannot be written to {first.url}: name a tier that takes them first")
        return _Writing(first, tier.new_pack(name))


def _open(address: TierAddress) -> ReadExtents:
    with _errors_of(address, "open"):
        return open_tier(address)


class _Reading:
    """A tier's pack whose errors are thaw's."""

    def __init__(self, address: TierAddress, pack: OpenPack) -> None:
        self._address, self._pack = address, pack
        self.nbytes, self.requests = pack.nbytes, pack.requests
        if self.requests.nbytes < 1:
            raise ValueError(f"it asks to be read {self.requests.nbytes} bytes at a time")

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        with _errors_of(self._address, "read"):
            self._pack.read_into(views, offset)

    def close(self) -> None:
        with _errors_of(self._address, "close"):
            self._pack.close()


class _Writing:
    """A tier's new pack whose errors are thaw's; an error of who writes it stays what it is."""

    def __init__(self, address: TierAddress, context: AbstractContextManager[NewPack]) -> None:
        self._address, self._context = address, context

    def __enter__(self) -> NewPack:
        with _errors_of(self._address, "write"):
            self._pack = self._context.__enter__()
        return self

    def write(self, data: memoryview, offset: int) -> None:
        with _errors_of(self._address, "write"):
            self._pack.write(data, offset)

    def end(self, nbytes: int) -> None:
        with _errors_of(self._address, "write"):
            self._pack.end(nbytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with _errors_of(self._address, "write"):
                self._context.__exit__(None, None, None)
            return
        with contextlib.suppress(Exception):
            self._context.__exit__(kind, error, trace)


@contextlib.contextmanager
def _errors_of(address: TierAddress, doing: str) -> Iterator[None]:
    """Whatever a tier raises that is not thaw's becomes `StorageFailed` with its address."""
    try:
        yield
    except (ThawError, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None:
            raise storage_failed(error, address.url, doing) from error
        raise _failed(address, doing, error) from error
    except Exception as error:
        raise _failed(address, doing, error) from error


def _failed(address: TierAddress, doing: str, error: Exception) -> StorageFailed:
    reason = str(error)[:500] or "no reason given"
    return StorageFailed(f"cannot {doing} {address.url}: {reason} ({type(error).__name__})")
