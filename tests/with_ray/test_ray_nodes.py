"""Several nodes: KV goes from daemon to daemon and never through Ray, and what a node loses is brought elsewhere."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, check_output
from typing import Any

import pytest
from ray_cluster import LocalCluster, cluster_of, counts, end_node, keepers, lives, nodes_of, pid_of, until

import thaw
from thaw.cluster import JoinedCluster, RayCluster
from thaw.core.errors import CorruptBlob, EngineDied, InvalidRequest
from thaw.data.reader import read_header
from thaw.pool import ForkPool, Snapshot
from thaw.store.leases import start_time
from thaw.testing.laws.pool_kit import TEXT, bits

SAMPLED = thaw.Sampling(temperature=0.9, max_tokens=24, ignore_eos=True)
pytestmark = pytest.mark.slow("Ray clusters of several nodes")


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[LocalCluster]:
    with cluster_of(2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def joined_two(two_nodes: LocalCluster) -> Iterator[JoinedCluster]:
    """That cluster, joined once for all pools that need no settings of their own."""
    with RayCluster(address=two_nodes.address).join() as cluster:
        yield cluster


def pool_on(cluster: JoinedCluster, **changes: Any) -> ForkPool:
    return ForkPool("fake", **{"backend": cluster, "workers": 2, "step_s": 0.004, **changes})


def taken_in(pool: ForkPool, worker: str) -> Snapshot:
    """A snapshot of a session that lives in that worker, and of a text that no other worker has read."""
    return pool.snapshot(pool.fork(pool.encode(worker + TEXT * 4), 1, SAMPLED, worker=worker, seed=3)[0])


def gone(pid: int) -> bool:
    return start_time(pid) is None


@pytest.mark.parametrize("tls", [False, True])
def test_kv_goes_from_node_to_node_and_never_through_ray(two_nodes: LocalCluster, tls: bool) -> None:
    with two_nodes.pool(workers=2, cluster={"tls": tls}) as pool:
        nodes = {node.is_home: node for node in nodes_of(pool)}
        assert len(nodes) == 2 and all(node.num_workers == 1 for node in nodes.values())
        decisions = []
        for worker in pool.workers:
            snapshot = taken_in(pool, worker)
            other = next(name for name in pool.workers if name != worker)
            here, moved = (pool.fork(snapshot, 2, SAMPLED, worker=name) for name in (worker, other))
            assert bits(moved) == bits(here)
            decisions.append(moved[0].decision)
        assert {(one.action, one.tier, bool(one.link)) for one in decisions if one is not None} == {
            ("hydrate", "node", True), ("hydrate", "arena", False)
        }, "to the far node it came over a link; at home everything is"  # fmt: skip
        rates = pool._rates.measured.loads
        assert any(name.startswith("node ") for name in rates) and rates["node"].points
        found = counts(pool)
        home, far = (found[nodes[where].key] for where in (True, False))
        assert far.sent_nbytes == home.received_nbytes > 0, "what the far node captured came home, by its socket"
        assert home.sent_nbytes == far.received_nbytes > 0, "and the far node fetched what it needed"
        home_packs = pool._arena.store.packs
        packs = {path.name: path.stat().st_size for path in Path(far.folder).rglob("*.safetensors")}
        assert far.nbytes == sum(packs.values()) > 0
        same = [path for path in Path(far.folder).rglob("*.safetensors") if (home_packs / path.name).exists()]
        assert same and all(path.read_bytes() == (home_packs / path.name).read_bytes() for path in same)
        assert pool._backend.nodes.object_store_nbytes() == 0  # type: ignore[attr-defined]
        assert pool._backend.nodes.num_direct == 0 < pool._backend.nodes.num_calls  # type: ignore[attr-defined]


def test_engines_run_as_the_node_does_and_not_as_rays_workers_do(
    two_nodes: LocalCluster, joined_two: JoinedCluster
) -> None:
    """Ray makes its workers nicer, and sets variables for them."""
    own = os.getpriority(os.PRIO_PROCESS, os.getpid())
    if os.geteuid() or own > 15:
        pytest.skip("only root may lower a niceness, and Ray's workers must be nicer than this process")
    code = (
        f"import os, ray; ray.init({two_nodes.address!r}, log_to_driver=False); "
        "print(ray.get(ray.remote(num_cpus=0)(lambda: os.getpriority(os.PRIO_PROCESS, 0)).remote()))"
    )
    assert int(check_output([sys.executable, "-c", code], stderr=DEVNULL)) > own, "the control: Ray's own workers"
    with pool_on(joined_two) as pool:
        for worker in pool.workers:
            pid = pid_of(pool, worker)
            assert os.getpriority(os.PRIO_PROCESS, pid) == own
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            names = {line.partition(b"=")[0].decode() for line in environment}
            assert not any(name.startswith("RAY_") for name in names)
            assert ("OMP_NUM_THREADS" in names) == ("OMP_NUM_THREADS" in os.environ)


def test_the_count_of_rays_object_store_sees_what_is_put_there(two_nodes: LocalCluster) -> None:
    """The control of the test above."""
    with RayCluster(address=two_nodes.address).join() as cluster:
        assert cluster.nodes.object_store_nbytes() == 0
        code = (
            f"import ray, time; ray.init({two_nodes.address!r}, log_to_driver=False); "
            "kept = ray.put(b'x' * 10_000_000); print('put', flush=True); input()"
        )
        with Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True) as other:
            assert other.stdout is not None and other.stdin is not None
            assert other.stdout.readline().strip() == "put"
            until(lambda: cluster.nodes.object_store_nbytes() >= 10_000_000)
            other.stdin.write("\n")
            other.stdin.close()


def test_a_commit_of_a_far_worker_is_whole_in_the_clients_repository(joined_two: JoinedCluster, tmp_path: Path) -> None:
    repo = thaw.init(tmp_path / "runs")
    with repo, pool_on(joined_two, repo=repo) as pool:
        far = next(node for node in nodes_of(pool) if not node.is_home)
        worker = next(w.name for w in pool.stats().workers if pool._fleet.named(w.name).life.host.node is far)  # type: ignore[union-attr]
        done = pool.fork(pool.encode(TEXT), 1, SAMPLED, worker=worker)[0]
        assert done.session is not None
        done.session.commit("far", branch="main")
        assert pool.fork("main", 2, SAMPLED)[0].ok
    with thaw.open(tmp_path / "runs", engine=thaw.load_engine("fake")) as again:
        assert again.fsck().ok
        assert again.session("main").generate("Go on.", SAMPLED).proof.hit


def test_a_byte_that_changed_on_the_way_is_refused_by_the_node_that_fetches_it(joined_two: JoinedCluster) -> None:
    """The control: without the change the same round gives the same bits."""
    with pool_on(joined_two) as pool:
        far = next(node for node in nodes_of(pool) if not node.is_home)
        name = next(w.name for w in pool.stats().workers if pool._fleet.named(w.name).life.host.node is far)  # type: ignore[union-attr]
        near = next(worker for worker in pool.workers if worker != name)
        snapshot = taken_in(pool, near)
        first = pool.fork(snapshot, 2, SAMPLED, worker=near)
        packs = [path for path in pool._arena.store.packs.glob("*.safetensors") if _has_kv(path)]
        whole = {path: path.read_bytes() for path in packs}
        for path, data in whole.items():
            entry = next(entry for entry in read_header(path).entries if not entry.is_pad and not entry.is_object)
            path.write_bytes(data[: entry.offset] + bytes([data[entry.offset] ^ 1]) + data[entry.offset + 1 :])
        damaged = pool.fork(snapshot, 2, SAMPLED, worker=name, errors="return")
        assert [type(result.error) for result in damaged] == [CorruptBlob, CorruptBlob], damaged[0].error
        assert counts(pool)[far.key].num_refused > 0 and counts(pool)[far.key].nbytes == 0, "nothing of it was kept"
        for path, data in whole.items():
            path.write_bytes(data)
        assert bits(pool.fork(snapshot, 2, SAMPLED, worker=name)) == bits(first)


def _has_kv(path: Path) -> bool:
    return any(not entry.is_object and not entry.is_pad for entry in read_header(path).entries)


def test_a_keeper_that_is_killed_costs_nothing_and_is_made_again(
    two_nodes: LocalCluster, joined_two: JoinedCluster
) -> None:
    with pool_on(joined_two) as pool:
        session = pool.session(seed=7)
        session.append(TEXT)
        before = [(w.name, w.pid) for w in pool.stats().workers]
        expected = bits(pool.fork(session, 4, SAMPLED, snapshot="before"))
        killed = keepers(two_nodes)
        assert len(killed) == 2
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        for worker in pool.workers:
            assert bits(pool.fork(session, 4, SAMPLED, worker=worker)) == expected
        assert len(counts(pool)) == 2, "while a keeper is away its node is asked directly"
        until = time.monotonic() + 60.0
        while len(set(keepers(two_nodes)) - set(killed)) < 2 and time.monotonic() < until:
            time.sleep(0.2)
        assert len(set(keepers(two_nodes)) - set(killed)) == 2, "each node has another keeper"
        assert [(w.name, w.pid) for w in pool.stats().workers] == before


def test_with_tls_an_engine_that_dies_is_booted_again_and_none_outlives_the_pool(two_nodes: LocalCluster) -> None:
    with two_nodes.pool(workers=2, cluster={"tls": True}) as pool:
        session = pool.session(seed=7)
        session.append(TEXT)
        expected = bits(pool.fork(session, 4, SAMPLED, snapshot="before"))
        for worker in pool.workers:
            before = pid_of(pool, worker)
            os.kill(before, signal.SIGKILL)
            until(lambda worker=worker, before=before: lives(pool, worker, before))  # type: ignore[misc]
            assert bits(pool.fork(session, 4, SAMPLED, worker=worker)) == expected
        pids = [pid_of(pool, worker) for worker in pool.workers]
        pids += [node.daemon.pid for node in nodes_of(pool) if node.daemon is not None]
    until(lambda: all(gone(pid) for pid in pids))


def test_a_node_that_is_lost_takes_no_branch_along(joined_two: JoinedCluster) -> None:
    with pool_on(joined_two) as pool:
        far = next(node for node in nodes_of(pool) if not node.is_home)
        name = next(w.name for w in pool.stats().workers if pool._fleet.named(w.name).life.host.node is far)  # type: ignore[union-attr]
        trunk = pool.encode(TEXT)
        kept = pool.fork(trunk, 2, SAMPLED, worker=name, store=True, seed=3)
        until(lambda: pool.stats().arena.num_captures >= 3)
        long = thaw.Sampling(temperature=0.9, max_tokens=60, ignore_eos=True)
        expected = bits(pool.fork(kept[0], 4, long, snapshot="before"))
        round_ = pool.submit(kept[0], 4, long)
        next(iter(round_))
        end_node(far, [pid_of(pool, name)])
        assert bits(round_.result(120)) == expected
        until(lambda: len(pool.workers) == 2)
        assert far not in nodes_of(pool)
        for worker in pool.workers:
            assert bits(pool.fork(kept[0], 4, long, worker=worker)) == expected


def test_engines_of_a_client_that_is_gone_end_and_the_lease_ends_the_rest(two_nodes: LocalCluster) -> None:
    """The client is killed: its engines end with their lines, the daemons and their folders with the lease."""
    client = Popen(
        [sys.executable, str(Path(__file__).with_name("ray_client.py")), two_nodes.address],
        stdout=PIPE, text=True,
    )  # fmt: skip
    assert client.stdout is not None
    folders, pids = client.stdout.readline().split("|")
    assert len(pids.split()) == 4 and not any(gone(int(pid)) for pid in pids.split())
    client.kill()
    client.wait()
    client.stdout.close()
    until(lambda: all(gone(int(pid)) for pid in pids.split()), 90)
    until(lambda: not any(Path(folder).exists() for folder in folders.split()), 30)


def test_a_pool_says_what_it_cannot_do(two_nodes: LocalCluster) -> None:
    for wrong in ({"lease_s": 0.1}, {"node_nbytes": 0}, {"address": "ray://somewhere:10001"}):
        with pytest.raises(InvalidRequest):
            RayCluster(**wrong)  # type: ignore[arg-type]
    with pytest.raises(EngineDied, match="labels"):
        two_nodes.pool(cluster={"labels": {"gpu": "none-has-it"}})
    with pytest.raises(EngineDied, match=r"interface .none-such"):
        two_nodes.pool(cluster={"interface": "none-such"})
    with pytest.raises(InvalidRequest, match="'ray'"):
        ForkPool("fake", backend="rays")
