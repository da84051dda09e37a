"""What a pool on Ray costs against one of local processes, and KV from node to node against a bare copy.

    python benchmarks/ray_pool.py OUT [--rounds R] [--pairs N] [--mib M] [--branches B]

    round    a round of B branches of the fake engine from a session in its worker: in a pool of local processes, and in
             one on a Ray cluster of one node that is started here; in turn, both pools live all the time
    client   CPU seconds of the client's own process for a token of a round (64 branches, streamed), and for a snapshot
    ask      a question to a node's daemon through Ray, and directly
    copy     a pack of M MiB, in turn: fetched by one daemon from another (checked, hashed, in place in its folder); and
             sent by one process to another over a bare socket, received into a file and hashed on a thread of its own;
             and fetched by a daemon with TLS from another; and by one with NIXL from another, where that is installed

All on one machine, over loopback, files in shared memory. The receipt goes to OUT/ray-pool.json.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import platform
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from mmap import mmap
from pathlib import Path

import msgspec
from blake3 import blake3

import thaw
from thaw import receipt as r
from thaw.cluster import RayCluster
from thaw.cluster.daemon import DaemonSettings
from thaw.cluster.keeper import start
from thaw.cluster.messages import DropPacks, EndNode, LookAtNode, NodeCounts, PackSource, PullPacks, ServeStore
from thaw.cluster.packs import PIECE
from thaw.cluster.peer import Peer
from thaw.cluster.tls import PoolTls, TlsGiven, new_certificate
from thaw.data.fresh_process import with_this_thaw
from thaw.data.pack import PackItem, write_pack
from thaw.receipt.machine import software, this_machine

STORE = "7" * 32
BLOB = 4 << 20
TOKENS = 16


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("out", type=Path)
    words.add_argument("--rounds", type=int, default=200, help="pairs of rounds")
    words.add_argument("--pairs", type=int, default=40, help="copies by each way")
    words.add_argument("--mib", type=int, default=256)
    words.add_argument("--branches", type=int, default=4)
    told = words.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    rounds, client, asked = pools(told.rounds, told.branches)
    copies = all_copies(told.pairs, told.mib)
    (told.out / "ray-pool.json").write_bytes(r.dumps(receipt_of(told, rounds, client, asked, copies)))


Pairs = list[tuple[float, float]]
Copies = list[dict[str, float]]
COPIES = {
    "bare": ("a bare copy", "sendfile to recv_into, hashed on a thread"),
    "nodes": ("from node to node", "one daemon fetches from another"),
    "tls": ("from node to node, TLS", "the same, with TLS"),
    "nixl": ("from node to node, NIXL", "the same, pushed by NIXL's UCX backend"),
}


def pools(pairs: int, branches: int) -> tuple[Pairs, Pairs, Pairs]:
    """(local, Ray) seconds of each pair of rounds; (per token, per snapshot) CPU seconds of the client; (through Ray,
    direct) seconds of a question."""
    os.environ.update(with_this_thaw(os.environ))
    sampling = thaw.Sampling(temperature=0.9, max_tokens=TOKENS, ignore_eos=True)
    found = []
    with (
        one_node() as cluster, thaw.ForkPool("fake") as local, thaw.ForkPool("fake", backend=cluster) as on_ray
    ):  # fmt: skip
        points = []
        for pool in (local, on_ray):
            session = pool.session(seed=7)
            session.append("A document that every branch needs. ")
            pool.fork(session, branches, sampling, snapshot="before")
            points.append((pool, session))
        for number in range(pairs):
            seconds = {}
            for which in (0, 1) if number % 2 else (1, 0):
                pool, session = points[which]
                began = time.perf_counter()
                results = pool.fork(session, branches, sampling, snapshot="never", keep=False)
                seconds[which] = time.perf_counter() - began
                assert all(result.ok for result in results)
            found.append((seconds[0], seconds[1]))
        client = [client_cpu(on_ray, points[1][1]) for _ in range(5)]
        return found, client, [question(on_ray) for _ in range(200)]


@contextlib.contextmanager
def one_node() -> Iterator[RayCluster]:
    """One of its own, whatever else runs on this machine."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield RayCluster(address=cluster.address)
    finally:
        cluster.shutdown()


def client_cpu(pool: thaw.ForkPool, session: object) -> tuple[float, float]:
    sampling = thaw.Sampling(temperature=0.9, max_tokens=32, ignore_eos=True)
    began = time.process_time()
    results = pool.fork(session, 64, sampling, snapshot="never")
    tokens = time.process_time() - began
    began = time.process_time()
    for result in results[:8]:
        pool.snapshot(result)
    return tokens / (64 * 32), (time.process_time() - began) / 8


def question(pool: thaw.ForkPool) -> tuple[float, float]:
    nodes = pool._backend.nodes  # type: ignore[attr-defined]
    node = next(one for one in nodes.all() if one.daemon is not None)
    began = time.perf_counter()
    nodes.ask(node, LookAtNode())
    middle = time.perf_counter()
    nodes.peer(node).ask(LookAtNode())
    return middle - began, time.perf_counter() - middle


def all_copies(pairs: int, mib: int) -> Copies:
    """By way, seconds of copies that were made in turn."""
    found: Copies = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        served = Path(folder) / "served"
        served.mkdir()
        name = make_pack(served, mib)
        ways: dict[str, Callable[[], float]] = {"bare": lambda: bare(served / name, Path(folder) / "bare")}
        for way, how in {"nodes": {}, "tls": {"tls": new_certificate()}, "nixl": {"nixl": True}}.items():
            if way != "nixl" or find_spec("nixl") is not None:
                two = stack.enter_context(two_daemons(folder, served, **how))
                ways[way] = functools.partial(fetched, *two, name)
        order = list(ways)
        for number in range(pairs):
            turn = number % len(order)
            seconds = {way: ways[way]() for way in order[turn:] + order[:turn]}
            found.append({way: seconds[way] for way in order})
    return found


@contextlib.contextmanager
def two_daemons(
    folder: str, served: Path, tls: TlsGiven | None = None, nixl: bool = False
) -> Iterator[tuple[Peer, PackSource]]:
    """One that serves the folder, and the other, which is to fetch from it: by NIXL alone, if it is to be that."""
    secret, sides = secrets.token_bytes(32), None if tls is None else PoolTls(tls)
    settings = DaemonSettings(
        key="a", host="127.0.0.1", secret=secret.hex(), lease_s=3600.0, node_nbytes=1 << 40, folder=folder, tls=tls,
        nixl=nixl,
    )  # fmt: skip
    first, second = start(settings), start(settings)
    one, other = (Peer(daemon.host, daemon.port, secret, sides) for daemon in (first, second))
    try:
        one.ask(ServeStore(uuid=STORE, folder=str(served)))
        other.ask(ServeStore(uuid=STORE))
        yield other, PackSource(key="a", host=first.host, port=first.port)
        counts = msgspec.convert(one.ask(LookAtNode()), NodeCounts)
        assert counts.pushed_nbytes == (counts.sent_nbytes if nixl else 0), (first.no_nixl, second.no_nixl, counts)
    finally:
        for peer in (one, other):
            peer.ask(EndNode())


def fetched(peer: Peer, source: PackSource, name: str) -> float:
    began = time.perf_counter()
    peer.ask(PullPacks(uuid=STORE, names=(name,), sources=(source,)), 600.0)
    seconds = time.perf_counter() - began
    peer.ask(DropPacks(uuid=STORE, names=(name,)))
    return seconds


def make_pack(folder: Path, mib: int) -> str:
    name = "bench.safetensors"
    items = [PackItem("", "U8", (BLOB,), BLOB, lambda: os.urandom(BLOB)) for _ in range((mib << 20) // BLOB)]
    write_pack(folder, name, items)
    return name


SENDER = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as sock, open(sys.argv[2], "rb") as file:
    sock.sendfile(file)
"""
RECEIVER = """
import sys
from pathlib import Path
from ray_pool import receive
receive(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
"""


def bare(path: Path, target: Path) -> float:
    """A process that sends the file and one that receives it; seconds from the connection to the last byte's hash, as
    the receiver measures them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = subprocess.Popen(
            [sys.executable, "-c", RECEIVER, str(listener.fileno()), str(path.stat().st_size), str(target)],
            pass_fds=[listener.fileno()], stdout=subprocess.PIPE, cwd=Path(__file__).parent,
        )  # fmt: skip
        assert receiver.stdout is not None
        receiver.stdout.readline()  # it is ready: its start is not measured
        sender = subprocess.Popen([sys.executable, "-S", "-c", SENDER, str(listener.getsockname()[1]), str(path)])
        seconds = float(receiver.stdout.readline())
        assert receiver.wait() == 0 and sender.wait() == 0
    target.unlink()
    return seconds


def receive(listener: int, nbytes: int, target: Path) -> None:
    """As a daemon does, without a header, a name or a check of what came."""
    with socket.socket(fileno=os.dup(listener)) as server, target.open("wb+") as file, ThreadPoolExecutor(1) as hasher:
        print("ready", flush=True)
        sock, _ = server.accept()
        with sock:
            began = time.perf_counter()
            os.posix_fallocate(file.fileno(), 0, nbytes)
            view, state = memoryview(mmap(file.fileno(), nbytes)), blake3()
            done: list[Future[object]] = []
            for begin in range(0, nbytes, PIECE):
                piece = rest = view[begin : begin + PIECE]
                while len(rest):
                    rest = rest[sock.recv_into(rest) :]
                done.append(hasher.submit(state.update, piece))
            for one in done:
                one.result()
            print(time.perf_counter() - began, flush=True)


def receipt_of(told: argparse.Namespace, rounds: Pairs, client: Pairs, asked: Pairs, copies: Copies) -> r.Receipt:
    arms = (
        r.Arm(name="local", title="rounds in a local process", text="a pool of one local process", rounds=tuple(
            r.Round(pair=i, values={"ms": one * 1e3}) for i, (one, _) in enumerate(rounds))),
        r.Arm(name="ray", title="rounds on Ray", text="a pool on a Ray cluster of one node", rounds=tuple(
            r.Round(pair=i, values={"ms": other * 1e3, "added_ms": (other - one) * 1e3})
            for i, (one, other) in enumerate(rounds))),
        r.Arm(name="client", title="the client's CPU", text="64 branches of 32 tokens on Ray, then 8 snapshots",
            rounds=tuple(r.Round(pair=i, values={"token_us": one * 1e6, "snapshot_ms": other * 1e3})
            for i, (one, other) in enumerate(client))),
        r.Arm(name="ask", title="a question to a node", text="through Ray, and directly",
            rounds=tuple(r.Round(pair=i, values={"through_ms": one * 1e3, "direct_ms": other * 1e3})
            for i, (one, other) in enumerate(asked))),
        *(
            r.Arm(name=way, title=COPIES[way][0], text=COPIES[way][1], rounds=tuple(
                r.Round(pair=i, values={"mib_per_s": told.mib / seconds[way]}) for i, seconds in enumerate(copies)))
            for way in copies[0]
        ),
    )  # fmt: skip
    rate = {way: r.Term(arm=way, value="mib_per_s") for way in copies[0]}
    derived = [
        r.median("round.local", "a local round", "ms", r.Term(arm="local", value="ms")),
        r.median("round.added", "what Ray adds to a round", "ms", r.Term(arm="ray", value="added_ms")),
        *(
            r.median(f"client.{value}", f"the client's CPU: {value}", unit, r.Term(arm="client", value=value))
            for value, unit in (("token_us", "us"), ("snapshot_ms", "ms"))
        ),
        *(
            r.median(f"ask.{value}", f"a question: {value}", "ms", r.Term(arm="ask", value=value))
            for value in ("through_ms", "direct_ms")
        ),
        *(r.median(f"copy.{way}", COPIES[way][0], "MiB/s", term) for way, term in rate.items()),
        r.ratio("copy.share", "from node to node, of a bare copy", rate["nodes"], rate["bare"]),
        *(
            r.ratio(f"copy.{way}-share", f"{COPIES[way][0]}: of a bare copy", rate[way], rate["bare"])
            for way in ("tls", "nixl")
            if way in rate
        ),
    ]
    settings = {"rounds": told.rounds, "pairs": told.pairs, "mib": told.mib, "branches": told.branches}
    words = " ".join(f"--{name} {value}" for name, value in settings.items())
    return r.make(
        kind="bench.ray-pool", command=f"python benchmarks/ray_pool.py OUT {words}",
        versions={"thaw": thaw.__version__, "python": platform.python_version(), **software("ray", "nixl")},
        machine=this_machine(), model=None, parameters={**settings, "tokens": TOKENS},
        arms=arms, derived=derived,
        goals=[
            r.at_most("round", "what Ray adds to a round", "round.added", 5.0),
            r.at_least("copy", "from node to node, of a bare copy with the same hashing", "copy.share", 0.8),
        ],
        notes=("One machine, over loopback, other programs running beside it: read the shares, not the rates.",),
    )  # fmt: skip


if __name__ == "__main__":
    main()
