"""A gateway over the fake engine. Test modules are skipped, by name, where the extra [server] is not installed
(`gateway_stand`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import thaw
from thaw.engines.base import Engine

if TYPE_CHECKING:
    from gateway_stand import Gateway, Start
    from thaw.gateway.settings import GatewaySettings
    from thaw.gateway.tenants import Tenants


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a gateway; all are closed at the end. `engine`: options of the fake engine, or one that runs. `engines`:
    how many there are."""
    from gateway_stand import TOKEN, Gateway
    from thaw.gateway.settings import GatewaySettings
    from thaw.gateway.tenants import single

    with ExitStack() as stack:

        def begin(
            *, tenants: Tenants | None = None, settings: GatewaySettings | None = None, name: str = "runs",
            engine: Engine | None = None, reconnect: Callable[[], Engine] | None = None, engines: int = 1,
            **options: Any,
        ) -> Gateway:  # fmt: skip
            def booted() -> Engine:
                return stack.enter_context(thaw.load_engine("fake", **options))

            others = [(booted(), reconnect) for _ in range(engines - 1)]
            found = Gateway(
                tmp_path / name, engine or booted(), tenants or single(TOKEN), settings or GatewaySettings(), reconnect,
                others,
            )  # fmt: skip
            stack.callback(lambda: None if not found._thread.is_alive() else found.close())
            return found

        yield begin


@pytest.fixture
def gateway(start: Start) -> Gateway:
    return start()
