"""Interleavings: actors on threads, each of whose requests to a bucket waits for its turn; who goes next is chosen.

The bucket below is real. A fault is a request whose answer is lost: it was made, or it was not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from thaw.core.errors import RemoteUncertain, RemoteUnreachable
from thaw.remote.bucket import Bucket, FoundObject, ListedObject, Version

WRITES = ("put", "create", "swap", "delete")


@dataclass
class Turns:
    """Hands out turns to the threads of actors, one at a time."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    waiting: dict[str, bool] = field(default_factory=dict)
    """actor -> whether it may go on"""
    running: set[str] = field(default_factory=set)

    def take(self) -> None:
        """Wait for a turn. Whoever is no actor needs none."""
        name = threading.current_thread().name
        with self.changed:
            if name not in self.running:
                return
            self.waiting[name] = False
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.waiting[name])
            del self.waiting[name]

    def run(self, actors: dict[str, Callable[[], None]], choose: Callable[[list[str]], str]) -> None:
        """Runs all actors to their end. An actor's error is raised here."""
        failed: list[BaseException] = []
        threads = [threading.Thread(target=self._act, args=(act, failed), name=name) for name, act in actors.items()]
        self.running = {thread.name for thread in threads}
        for thread in threads:
            thread.start()
        while True:
            with self.changed:
                self.changed.wait_for(
                    lambda: self.waiting.keys() == self.running and not any(self.waiting.values()), 120
                )
                assert self.waiting.keys() == self.running, f"{self.running - self.waiting.keys()} hang"
                if not self.running:
                    break
                self.waiting[choose(sorted(self.running))] = True
                self.changed.notify_all()
                self.changed.wait_for(lambda: not any(self.waiting.values()), 120)
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]

    def _act(self, act: Callable[[], None], failed: list[BaseException]) -> None:
        try:
            self.take()
            act()
        except BaseException as error:  # noqa: BLE001 - raised again where the actors are run
            failed.append(error)
        finally:
            with self.changed:
                self.running.discard(threading.current_thread().name)
                self.changed.notify_all()


Fault = Callable[[str, str], str]
"""(request, key) -> "" or "before" or "after": whether the answer is lost, and whether the request was made."""


def no_fault(request: str, key: str) -> str:
    return ""


class SteppedBucket:
    """A bucket whose requests wait for their turns. `swaps`: every swap that was made, in order: (key, bytes)."""

    def __init__(self, bucket: Bucket, turns: Turns, fault: Fault = no_fault) -> None:
        self._bucket, self._turns, self._fault = bucket, turns, fault
        self.swaps: list[tuple[str, bytes]] = []

    @property
    def url(self) -> str:
        return self._bucket.url

    def _ask(self, request: str, key: str, *args: object) -> object:
        self._turns.take()
        lost = self._fault(request, key)
        if lost == "before":
            raise RemoteUnreachable(f"{request} {key}: no answer")
        done = getattr(self._bucket, request)(key, *args)
        if request == "swap" and done is not None:
            self.swaps.append((key, bytes(args[0])))  # type: ignore[call-overload]
        if lost == "after" and request in WRITES:
            uncertain = request in ("create", "swap")
            raise (RemoteUncertain if uncertain else RemoteUnreachable)(f"{request} {key}: the answer was lost")
        return done

    def read(self, key: str) -> FoundObject | None:
        return self._ask("read", key)  # type: ignore[return-value]

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        return self._ask("read_ranges", key, ranges)  # type: ignore[return-value]

    def size(self, key: str) -> int | None:
        return self._ask("size", key)  # type: ignore[return-value]

    def put(self, key: str, data: bytes | memoryview) -> None:
        self._ask("put", key, data)

    def create(self, key: str, data: bytes) -> Version | None:
        return self._ask("create", key, data)  # type: ignore[return-value]

    def swap(self, key: str, data: bytes, expected: Version) -> Version | None:
        return self._ask("swap", key, data, expected)  # type: ignore[return-value]

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:  # as stores do that have no bulk delete
            self._turns.take()
            self._bucket.delete([key])

    def entries(self, prefix: str) -> Iterator[ListedObject]:
        self._turns.take()
        return iter(list(self._bucket.entries(prefix)))

    def now(self) -> float:
        return self._bucket.now()
