"""What a client of a served engine reads of packs, and what it asks others for, without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from served_stand import Joined, joined
from thaw.core.errors import CorruptBlob, NotFound, StaleSession, StorageFailed, ThawError
from thaw.engines import load_engine
from thaw.engines.base import HydratePlan
from thaw.engines.served import protocol
from thaw.engines.served.protocol import Answer
from thaw.testing.laws.kit import Lab
from thaw.testing.plans import mount_at

LIMIT_S = 10.0


@pytest.fixture
def plan(tmp_path: Path) -> HydratePlan:
    lab = Lab(mount_at(tmp_path / "packs"))
    with load_engine("fake") as engine:
        return lab.plan(lab.capture(engine, lab.begin(engine, 300)))


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Joined]:
    with joined(tmp_path / "mail") as found:
        yield found


def twice(client: Joined, plan: HydratePlan) -> Any:
    """Hydrated, and once more beside the first."""
    first = client.engine.hydrate(plan).result(LIMIT_S)
    return client.engine.hydrate(msgspec.structs.replace(plan, beside=first.session)).result(LIMIT_S)


def refuse(error: ThawError | None) -> Any:
    def answer(message: Any) -> Answer:
        if error is not None and isinstance(message, protocol.Fill) and message.source is not None:
            return Answer(kind=error.kind, error=str(error))
        return Answer(local=getattr(message, "num_kv", 0))

    return answer


@pytest.mark.parametrize("error", [NotFound("gone"), StaleSession("of other weights"), StorageFailed("broken")])
def test_where_the_session_beside_is_gone_all_is_read(client: Joined, plan: HydratePlan, error: ThawError) -> None:
    """By a message and into a record of its own: an engine begins a message once, and of the first attempt a rank may
    be reading yet."""
    client.stand.answer = refuse(error)
    assert twice(client, plan).proof.num_cached_tokens == plan.num_kv
    _, with_source, alone = client.of(protocol.Fill)
    assert with_source.source is not None and alone.source is None and alone.num_kv == 0
    assert alone.id != with_source.id and alone.record != with_source.record
    assert with_source.record in alone.drop, "what the first attempt left is let go of"
    assert list((client.stand.mail.folder / "plans").iterdir()) == []


def test_where_it_is_there_nothing_is_read_twice(client: Joined, plan: HydratePlan) -> None:
    client.stand.answer = refuse(None)
    twice(client, plan)
    assert [message.source is None for message in client.of(protocol.Fill)] == [True, False]


def test_another_error_is_the_callers(client: Joined, plan: HydratePlan) -> None:
    client.stand.answer = refuse(CorruptBlob("damaged"))
    with pytest.raises(CorruptBlob, match="damaged"):
        twice(client, plan)
