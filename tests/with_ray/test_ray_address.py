"""A cluster's address that leads nowhere is refused in seconds; Ray itself tries for a minute and a half."""

from __future__ import annotations

import socket
import time

import pytest

from thaw.cluster import RayCluster
from thaw.cluster.desk import require_listener
from thaw.core.errors import EngineDied

REFUSED_IN_S = 45.0
"""Most of it is a process that imports Ray, on a busy machine."""


def port_of_nobody() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.parametrize("by", ["argument", "variable"])
def test_an_address_where_nothing_listens_is_refused_at_once(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = f"127.0.0.1:{port_of_nobody()}"
    if by == "variable":
        monkeypatch.setenv("RAY_ADDRESS", wrong)
    began = time.monotonic()
    with pytest.raises(EngineDied, match=rf"nothing listens at {wrong} \(Connection refused\)"):
        RayCluster(address=wrong if by == "argument" else None).join()
    assert time.monotonic() - began < REFUSED_IN_S


def test_a_host_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConnectionError, match=r"nothing listens at no-such-host\.invalid:6379"):
        require_listener("no-such-host.invalid:6379")


def test_a_listener_passes_and_so_do_addresses_of_another_form() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        require_listener(f"127.0.0.1:{server.getsockname()[1]}")
    for other in ("", "auto", "local", "127.0.0.1", "127.0.0.1:99999", f"ray://127.0.0.1:{port_of_nobody()}"):
        require_listener(other)
