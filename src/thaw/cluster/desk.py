"""The desk: the process that has joined Ray on behalf of a pool, `python -m thaw.cluster.desk FD`. Ray is imported
here, and in `bundles.py` for it.

Ray ends every process that has joined it when the cluster's head is gone for a minute. The pool's own process holds
results and sessions, so it does not join; when this one ends, the pool starts another as soon as Ray is back.

It answers questions over a socket pair, many at a time: msgpack, with their length before them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import msgspec

from thaw.cluster.bundles import BundleShare, FoundGroups, RayBundles, TakenShare
from thaw.cluster.framing import read_frame, send_frame
from thaw.cluster.keeper import SMALL_BYTES, NodeKeeper

OBJECT_STORE_BYTES = 80 << 20
"""Of a cluster that is started here: about the least that Ray takes."""
MAX_AT_ONCE = 64
PROBE_S = 5.0
"""For a connection to the address that was named."""
MAX_PORT = 65_535
Trouble = Literal["", "ray", "keeper", "daemon", "other"]


class DeskCall(msgspec.Struct, frozen=True, kw_only=True):
    """`verb`: join, nodes, keep, ask, look, groups, take_share, free_share, look_share or object_store, with its
    arguments."""

    id: int
    verb: str
    text: str = ""
    data: bytes = b""
    extra: bytes | None = None
    limit_s: float = 60.0


class DeskReply(msgspec.Struct, frozen=True, kw_only=True):
    """`trouble`: what failed, "" for nothing: Ray itself, the keeper, or the daemon behind it."""

    id: int
    value: Any = None
    trouble: Trouble = ""
    text: str = ""


class RayNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node as Ray knows it, alive. `here`: the one that the desk runs on. `gpus`, `cpus`: what Ray counts there, used
    or not."""

    ray_id: str
    address: str
    labels: dict[str, str]
    here: bool
    gpus: float = 0.0
    cpus: float = 0.0


CALLS = msgspec.msgpack.Decoder(DeskCall)
DESK_REPLIES = msgspec.msgpack.Decoder(DeskReply)
ENCODE = msgspec.msgpack.Encoder().encode


class RayDesk:
    """Answers. Keepers are known by their nodes' keys."""

    def __init__(self) -> None:
        self._keepers: dict[str, Any] = {}
        self._bundles = RayBundles()

    def answer(self, call: DeskCall) -> DeskReply:
        import ray.exceptions as errors

        try:
            return DeskReply(id=call.id, value=getattr(self, f"do_{call.verb}")(call))
        except errors.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, OSError) else None
            return DeskReply(id=call.id, trouble="daemon" if cause else "other", text=f"{cause or error.cause}")
        except (errors.RayActorError, errors.ActorUnschedulableError, KeyError) as error:
            return DeskReply(id=call.id, trouble="keeper", text=_why(error))
        except (errors.RayError, OSError, RuntimeError, ValueError) as error:
            return DeskReply(id=call.id, trouble="ray", text=f"{type(error).__name__}: {error}"[:500])

    def do_join(self, call: DeskCall) -> str:
        """Join the cluster at `text`, or what there is, or a new one. The version."""
        import ray

        named = call.text or os.environ.get("RAY_ADDRESS", "")
        if not call.extra:
            require_listener(named)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            ray.init(address=named or "auto", **quiet)
        except ConnectionError:
            if named or call.extra:
                raise
            ray.init(address="local", object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, **quiet)
        return str(ray.__version__)

    def do_nodes(self, call: DeskCall) -> list[RayNode]:
        import ray

        here = ray.get_runtime_context().get_node_id()
        return [
            RayNode(
                ray_id=node["NodeID"], address=node["NodeManagerAddress"], labels=dict(node.get("Labels") or {}),
                here=node["NodeID"] == here, gpus=node["Resources"].get("GPU", 0.0),
                cpus=node["Resources"].get("CPU", 0.0),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]  # fmt: skip

    def do_keep(self, call: DeskCall) -> bytes:
        """A keeper on the node `text` (Ray's id); `data` holds its arguments. The daemon's address."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        key, settings, interface = msgspec.msgpack.decode(call.data, type=tuple[str, bytes, str | None])
        there = NodeAffinitySchedulingStrategy(call.text, soft=False)
        made = ray.remote(NodeKeeper).options(num_cpus=0, scheduling_strategy=there, max_concurrency=MAX_AT_ONCE)
        keeper = made.remote(settings, call.extra, interface)
        address: bytes = ray.get(keeper.address.remote(), timeout=call.limit_s)
        self._keepers[key] = keeper
        return address

    def do_ask(self, call: DeskCall) -> bytes:
        """`data` to the keeper of node `text`."""
        import ray

        assert len(call.data) <= SMALL_BYTES
        answer: bytes = ray.get(self._keepers[call.text].ask.remote(call.data), timeout=call.limit_s)
        return answer

    def do_look(self, call: DeskCall) -> bytes:
        """That the keeper of node `text` is there: its daemon's address."""
        import ray

        address: bytes = ray.get(self._keepers[call.text].address.remote(), timeout=call.limit_s)
        return address

    def do_groups(self, call: DeskCall) -> FoundGroups:
        """Placement groups of the id or the name `text`."""
        return self._bundles.groups(call.text)

    def do_take_share(self, call: DeskCall) -> TakenShare | None:
        """`data` is the share; None where Ray does not give it in time."""
        return self._bundles.take(msgspec.msgpack.decode(call.data, type=BundleShare), call.limit_s)

    def do_free_share(self, call: DeskCall) -> None:
        self._bundles.free(call.text)

    def do_look_share(self, call: DeskCall) -> bool:
        return self._bundles.look(call.text, call.limit_s)

    def do_object_store(self, call: DeskCall) -> int:
        """Bytes that are used in the cluster's object stores."""
        import ray

        name = "object_store_memory"
        return int(ray.cluster_resources().get(name, 0) - ray.available_resources().get(name, 0))


def require_listener(address: str) -> None:
    """Raises `ConnectionError` where nothing listens at HOST:PORT: Ray itself tries for a minute and a half. Whether it
    is a Ray head that listens is Ray's to find out, and so are addresses of another form."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > MAX_PORT or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), PROBE_S).close()
    except OSError as error:
        raise ConnectionError(f"nothing listens at {address} ({error.strerror or error})") from None


def _why(error: Exception) -> str:
    """One line. Of an actor that failed as it began, Ray tells the call first and the reason last."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if getattr(error, "actor_init_failed", False) else 0].strip()[:300]


def main(fd: int) -> None:
    sock, desk, lock = socket.socket(fileno=fd), RayDesk(), threading.Lock()

    def work(call: DeskCall) -> None:
        reply = ENCODE(desk.answer(call))
        with lock, contextlib.suppress(OSError):
            send_frame(sock, reply)

    with ThreadPoolExecutor(MAX_AT_ONCE) as threads:
        while (data := read_frame(sock)) is not None:
            threads.submit(work, CALLS.decode(data))
        _leave()  # the pool is gone


def _leave() -> None:
    """Out of Ray, and a cluster that was started here ends; whatever still waits for an answer waits for nothing."""
    import ray

    with contextlib.suppress(Exception):
        ray.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
