"""What follows commits runs in another process, so that no request waits for the interpreter's lock; and it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from gateway_stand import Gateway
from thaw.gateway import upkeep
from thaw.store.gather import COUNT
from thaw.store.store import Store


def commit(gateway: Gateway, number: int) -> None:
    with gateway.repo.session() as session:
        session.append(token_ids=[7, number])
        session.commit(f"commit {number}")


def num_packs(store: Store) -> int:
    return len(os.listdir(store.packs))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How the processes ended."""
    codes, real = list[int](), subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        done = real(command, **options)
        codes.append(done.returncode)
        return done

    monkeypatch.setattr(subprocess, "run", run)
    return codes


def many_commits(gateway: Gateway) -> Store:
    """Two packs each; waits for what follows them."""
    for number in range(COUNT // 2 + 5):
        commit(gateway, number)
    store: Store = gateway.repo.store
    store.upkeep.wait()
    return store


def test_small_packs_are_put_together_by_another_process(
    gateway: Gateway, ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(*_: object) -> None:
        raise AssertionError("it ran in the gateway")

    monkeypatch.setattr(upkeep.ProcessUpkeep, "_here", here)
    store = many_commits(gateway)
    assert ran == [0] and num_packs(store) < COUNT and store.fsck().problems == []


def test_a_tenants_commits_are_put_together_so_too(gateway: Gateway, ran: list[int]) -> None:
    mine = gateway.service.engines.any.within("acme").sync
    for number in range(COUNT // 2 + 5):
        with mine.session() as session:
            session.append(token_ids=[7, number])
            session.commit(f"commit {number}")
    mine.store.upkeep.wait()
    assert ran == [0] and num_packs(mine.store) < COUNT


@pytest.mark.parametrize("command", [["/nowhere/python"], [sys.executable, "-c", "raise SystemExit(1)"]])
def test_where_no_process_runs_the_thread_does_it(gateway: Gateway, ran: list[int], command: list[str]) -> None:
    kept = gateway.repo.store.upkeep
    assert isinstance(kept, upkeep.ProcessUpkeep)
    kept.command = command
    store = many_commits(gateway)
    assert ran in ([], [1]) and num_packs(store) < COUNT and store.fsck().problems == []


def test_a_process_that_is_killed_is_left_to_a_later_commit(gateway: Gateway, ran: list[int]) -> None:
    kept = gateway.repo.store.upkeep
    assert isinstance(kept, upkeep.ProcessUpkeep)
    whole, kept.command = kept.command, [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    store = many_commits(gateway)
    assert ran and set(ran) == {-9} and num_packs(store) >= COUNT
    kept.command = whole
    commit(gateway, 200)
    kept.wait()
    assert ran[-1] == 0 and num_packs(store) < COUNT and store.fsck().problems == []
