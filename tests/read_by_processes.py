"""The laws of bytes and of proof where processes beside the engine's worker read its packs, and who may be killed.

A subclass boots both engines with `readers=NUM_READERS`; the worker is the process of the engine that has the arena.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from thaw.engines.base import Engine
from thaw.engines.served.client.channel import worker_facts
from thaw.engines.served.client.engine import ServedEngine
from thaw.testing.laws.bytes_law import BytesLaw, blob_ids
from thaw.testing.laws.kit import Lab, until
from thaw.testing.laws.proof_law import ProofLaw

NUM_READERS = 2
MOST_WAITS = 3
"""Of a worker, for a load of any number of blobs."""


def counts(engine: Engine) -> tuple[int, int, int]:
    """Sessions asked for, loads by readers, and the worker's waits for them."""
    stats = cast(ServedEngine, engine).stats()
    return stats["hydrates"], stats["reader_loads"], stats["reader_waits"]


def head_of(engine: Engine) -> int:
    """The process beside the engine's only worker."""
    worker = worker_facts(cast(ServedEngine, engine)._transport)[0].pid
    (head,) = [pid for pid in children(worker) if b"thaw.data.readers.head" in _command(pid)]
    return head


def children(pid: int) -> list[int]:
    """Whichever of its threads began them."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(one) for thread in threads for one in (thread / "children").read_text().split()]


def is_there(pid: int) -> bool:
    return bool(_command(pid))  # nothing of one that has ended and that nobody asked for


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


class ReadByProcessesTests(BytesLaw, ProofLaw):
    @pytest.fixture(scope="class")
    @classmethod
    def other(cls, engine_factory: Callable[..., Engine]) -> Iterator[Engine]:
        """Nothing of its readers is left once it is closed."""
        with engine_factory() as loaded:
            yield loaded
            head = head_of(loaded)
            processes = [head, *children(head)]
            assert len(processes) == 1 + NUM_READERS and all(map(is_there, processes))
        until(lambda: not any(map(is_there, processes)))

    @pytest.fixture(autouse=True)
    def _no_load_by_threads(self, request: pytest.FixtureRequest, other: Engine) -> Iterator[None]:
        """Every hydrate that is no failure was read by readers, and the worker waited for each of them a few times."""
        before = counts(other)
        yield
        asked, loads, waits = (now - then for now, then in zip(counts(other), before, strict=True))
        assert waits <= MOST_WAITS * asked
        if not {"kill", "refused", "error"} & set(request.node.name.split("_")):
            assert loads == asked

    @pytest.mark.parametrize("victim", ["reader", "head"])
    def test_a_kill_between_loads_costs_nothing(self, engine: Engine, other: Engine, lab: Lab, victim: str) -> None:
        first = lab.capture(engine, lab.begin(engine, 300))
        lab.hydrate(other, lab.plan(first))
        head = head_of(other)
        process = head if victim == "head" else children(head)[0]
        os.kill(process, signal.SIGKILL)
        until(lambda: not is_there(process))
        for _ in range(2):
            again = lab.capture(other, lab.hydrate(other, lab.plan(first)).session)
            assert blob_ids(first)[: len(blob_ids(again)) - 1] == blob_ids(again)[:-1]
        until(lambda: len(children(head_of(other))) == NUM_READERS)

    def test_a_kill_in_a_load_costs_nothing(self, engine: Engine, other: Engine, lab: Lab) -> None:
        """A reader is stopped before, so that the load cannot end without it."""
        first = lab.capture(engine, lab.begin(engine, 700))
        process = children(head_of(other))[0]
        os.kill(process, signal.SIGSTOP)
        before, handle = counts(other)[0], other.hydrate(lab.plan(first))
        until(lambda: counts(other)[0] > before)
        os.kill(process, signal.SIGKILL)
        again = lab.capture(other, handle.result(60).session)
        assert blob_ids(first)[: len(blob_ids(again)) - 1] == blob_ids(again)[:-1]
        lab.hydrate(other, lab.plan(first))
