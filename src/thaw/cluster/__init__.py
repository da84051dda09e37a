"""The pool on a cluster: workers on many nodes, KV from node to node.

    pool = thaw.ForkPool("vllm", model=…, workers=8, backend="ray")
    pool = thaw.ForkPool("vllm", model=…, workers=8, backend=RayCluster(interface="ib0"))

On every node one process of ours, the *daemon*, owns the node's folder of packs and the engines' processes, and sends
packs to the daemons of other nodes. Ray finds the nodes, starts the daemons through an actor a node (the *keeper*), and
carries the calls that control them; these are small. Tokens come straight from the engine to the client, and KV goes
from daemon to daemon: neither passes through Ray.

    joining.py      RayCluster, what a caller gives; settings.py what it may say
    backend.py      the pool's backend: which node boots a worker; the handle of one worker
    engine.py       a worker's engine: packs are brought before a hydrate, and home after a capture
    nodes.py        the client's view of the nodes, their leases, and the two ways to ask one
    desk.py         the process that has joined Ray, for the client; with bundles.py, all that imports it
    shares.py       which worker has which share of a placement group
    keeper.py       the actor
    daemon.py       the process on a node; with server.py, engines.py, packs.py and nixl_agent.py
    peer.py         how a daemon is talked to; with secret.py, tls.py, framing.py and messages.py
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thaw.cluster.joining import JoinedCluster, RayCluster
    from thaw.cluster.tls import TlsFiles

__all__ = ["JoinedCluster", "RayCluster", "TlsFiles"]


def __getattr__(name: str) -> Any:
    """Names load on first use: a daemon needs none of them."""
    if name not in __all__:
        raise AttributeError(f"module 'thaw.cluster' has no attribute {name!r}")
    return getattr(importlib.import_module(f"thaw.cluster.{'tls' if name == 'TlsFiles' else 'joining'}"), name)
