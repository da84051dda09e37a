"""Tables of handlers in the served engines: each kind of job and of command has exactly one, and no other kind has."""

from __future__ import annotations

import importlib
import inspect
from functools import singledispatchmethod
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from thaw.engines.served import protocol
from thaw.engines.vllm import jobs

JOBS, COMMANDS = frozenset(get_args(jobs.Job)), frozenset(get_args(protocol.Command))
TABLES = {
    ("thaw.engines.vllm.worker.worker", "WorkerSide", "_do"): JOBS,
    ("thaw.engines.vllm.worker.worker", "WorkerSide", "_tell"): JOBS,
    ("thaw.engines.vllm.scheduler.commands", "SchedulerCommands", "_start"): COMMANDS,
    # `Hello` is answered where a request comes in (`hooks`), before there is a command.
    ("thaw.engines.sglang.scheduler.commands", "RankCommands", "_start"): COMMANDS - {protocol.Hello},
}


def table(owner: type, name: str) -> singledispatchmethod[Any]:
    found = vars(owner)[name]
    assert isinstance(found, singledispatchmethod)
    return found


@pytest.fixture(params=TABLES, ids=lambda key: f"{key[1]}.{key[2]}")
def place(request: pytest.FixtureRequest) -> Any:
    module, owner, name = request.param
    return SimpleNamespace(
        owner=getattr(importlib.import_module(module), owner), name=name, kinds=TABLES[request.param]
    )


def test_every_kind_has_a_handler_and_no_other_has(place: Any) -> None:
    registered = set(table(place.owner, place.name).dispatcher.registry) - {object}
    assert registered == place.kinds


def test_no_kind_has_two_handlers(place: Any) -> None:
    """The table keeps the one that was registered last; the other would stand there unused."""
    assert inspect.getsource(place.owner).count(f"@{place.name}.register") == len(place.kinds)


def test_what_is_in_no_table_is_refused(place: Any) -> None:
    unknown = table(place.owner, place.name).dispatcher.dispatch(SimpleNamespace)
    rest = [RuntimeError()] * (len(inspect.signature(unknown).parameters) - 2)
    with pytest.raises(NotImplementedError, match="SimpleNamespace"):
        unknown(object(), SimpleNamespace(), *rest)
