"""Workers in the bundles of a placement group: on the devices that Ray gives, in Ray's books, and nowhere else.

The nodes declare GPUs that are not there. Ray counts and names them all the same, and the fake engine needs none: what
is looked at is which devices each worker's process may see.
"""

from __future__ import annotations

import os
import secrets
import signal
import warnings
from collections.abc import Callable, Iterator

import pytest
from ray_cluster import LocalCluster, devices, in_group, keepers, lives, nodes_of, pid_of, until, with_gpus
from ray_driver import RayDriver

import thaw
from thaw.cluster import RayCluster, shares
from thaw.core.errors import Busy, EngineDied, InvalidRequest, NotFound
from thaw.pool import ForkPool
from thaw.testing.laws.pool_kit import TEXT, bits

GPUS = 2
SAMPLED = thaw.Sampling(temperature=0.9, max_tokens=16, ignore_eos=True)
pytestmark = pytest.mark.slow("a Ray cluster of two nodes")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with with_gpus(2, GPUS) as found:
        yield found


@pytest.fixture(scope="module")
def driver(cluster: LocalCluster) -> Iterator[RayDriver]:
    found = RayDriver(cluster.address)
    yield found
    found.close()


Make = Callable[..., str]


@pytest.fixture
def group(driver: RayDriver) -> Iterator[Make]:
    """Makes one, by its bundles; its name. All of them go with the test."""
    ids: list[str] = []

    def make(*bundles: dict[str, float], name: str = "", **how: object) -> str:
        name = name or f"group-{secrets.token_hex(4)}"
        ids.append(driver.group(name, *bundles, **how))  # type: ignore[arg-type]
        return name

    make.ids = ids  # type: ignore[attr-defined]
    yield make
    for one in ids:
        driver.remove(one)


def test_each_worker_has_a_bundle_and_no_two_share_a_device(
    cluster: LocalCluster, driver: RayDriver, group: Make
) -> None:
    name = group(*[{"GPU": 1}] * 4)
    with in_group(cluster, name, 4) as pool:
        found = devices(pool)
        assert len(set(found.values())) == len(found) == 4, found
        assert {device for _, device in found.values()} == {"0", "1"} and len({key for key, _ in found.values()}) == 2
        for bundle in range(4):
            assert not driver.can_take(group.ids[0], bundle, 1, 0.5), "in Ray's books they are taken"  # type: ignore[attr-defined]
        session = pool.session(seed=7)
        session.append(TEXT)
        expected = bits(pool.fork(session, 4, SAMPLED, snapshot="before"))
        for worker in pool.workers:
            assert bits(pool.fork(session, 4, SAMPLED, worker=worker)) == expected
        assert pool._backend.nodes.object_store_nbytes() == 0  # type: ignore[attr-defined]
    assert driver.can_take(group.ids[0], 0, 1, 30), "and given back with the pool"  # type: ignore[attr-defined]
    with cluster.pool(workers=2) as pool:
        assert {device for _, device in devices(pool).values()} == {os.environ.get("CUDA_VISIBLE_DEVICES")}, (
            "the control"
        )


def test_more_workers_than_bundles_are_refused_and_none_runs(cluster: LocalCluster, group: Make) -> None:
    name = group({"GPU": 1}, {"GPU": 1})
    with pytest.raises(InvalidRequest, match=rf"'{name}' has room for 2 workers \(in 2 bundles\).*at most 2"):
        in_group(cluster, name, 3)
    with in_group(cluster, name, 1) as pool:
        other = pool.add_worker()
        with pytest.raises(InvalidRequest, match="room for 2 workers"):
            pool.add_worker()
        assert len(set(devices(pool).values())) == 2 and pool.fork(pool.encode(TEXT), 2, SAMPLED, spread=2)[1].ok
        pool.drain(other)
        pool.add_worker()
        assert len(set(devices(pool).values())) == 2, "what a worker had is free when it has gone"


def test_pools_that_share_a_cluster_share_no_bundle(cluster: LocalCluster, group: Make) -> None:
    name = group({"GPU": 1}, {"GPU": 1})
    with RayCluster(address=cluster.address, placement_group=name).join() as joined:
        with ForkPool("fake", backend=joined) as one, ForkPool("fake", backend=joined) as other:
            assert len({*devices(one).values(), *devices(other).values()}) == 2
            with pytest.raises(InvalidRequest, match="room for 2 workers"):
                ForkPool("fake", backend=joined)
        with ForkPool("fake", backend=joined) as again:
            assert len(devices(again)) == 1


def test_a_worker_has_all_of_a_bundle_or_so_many_of_its_gpus(
    cluster: LocalCluster, driver: RayDriver, group: Make
) -> None:
    name = group({"GPU": GPUS, "CPU": 1})
    for each, workers, seen in ((None, 1, [{"0,1"}]), (1, 2, [{"0", "1"}]), (0.5, 1, [{"0"}, {"1"}])):
        with in_group(cluster, name, workers, gpus_per_worker=each) as pool:
            assert len(devices(pool)) == workers and {device for _, device in devices(pool).values()} in seen
            with pytest.raises(InvalidRequest, match="room for"):
                pool.add_worker()
            if each == 0.5:
                assert driver.can_take(group.ids[0], 0, 1, 60), "the rest is for others"  # type: ignore[attr-defined]


def test_a_bundle_without_gpus_shows_its_worker_none(cluster: LocalCluster, group: Make) -> None:
    name = group({"CPU": 1}, {"GPU": 1})
    with in_group(cluster, name, 2) as pool:
        assert [device for _, device in devices(pool).values()] in (["", "0"], ["", "1"])
    with in_group(cluster, name, gpus_per_worker=1) as pool, pytest.raises(InvalidRequest, match="room for 1 worker"):
        pool.add_worker()


def test_a_group_that_cannot_be_used_is_named(cluster: LocalCluster, driver: RayDriver, group: Make) -> None:
    there = group({"GPU": 1})
    with pytest.raises(NotFound, match=rf"no placement group 'none' is in the Ray cluster; there are: .*{there}"):
        in_group(cluster, "none")
    pending = group({"GPU": 50}, ready=False)
    with pytest.raises(Busy, match=rf"'{pending}' is not ready \(PENDING\)"):
        in_group(cluster, pending)
    gone = f"group-{secrets.token_hex(4)}"
    driver.remove(driver.group(gone, {"GPU": 1}))
    with pytest.raises(NotFound, match=rf"the placement group '{gone}' was removed"):
        in_group(cluster, gone)
    with pytest.raises(
        InvalidRequest, match=rf"gpus_per_worker=2: no bundle .*'{there}' has as many GPUs; they have \[1"
    ):
        in_group(cluster, there, gpus_per_worker=2)
    with pytest.raises(InvalidRequest, match="env sets CUDA_VISIBLE_DEVICES"):
        cluster.pool(cluster={"placement_group": there}, env=[{"CUDA_VISIBLE_DEVICES": "0"}])
    other = RayDriver(cluster.address, "another")
    try:
        other.group(there, {"CPU": 0.1})
        with pytest.raises(InvalidRequest, match=f"2 placement groups are called '{there}'.*{group.ids[0]}"):  # type: ignore[attr-defined]
            in_group(cluster, there)
        with in_group(cluster, group.ids[0]) as pool:  # type: ignore[attr-defined]
            assert [device for _, device in devices(pool).values()] in (["0"], ["1"]), "by its id"
    finally:
        other.close()


def test_settings_that_contradict_each_other_are_refused() -> None:
    for wrong, words in (
        ({"placement_group": ""}, "placement_group=''"), ({"placement_group": 3}, "placement_group=3"),
        ({"gpus_per_worker": 1}, "give placement_group"),
        ({"placement_group": "a", "labels": {"b": "c"}}, "labels and placement_group"),
        ({"placement_group": "a", "gpus_per_worker": 1.5}, r"gpus_per_worker=1\.5"),
        ({"placement_group": "a", "gpus_per_worker": 0}, "gpus_per_worker=0"),
    ):  # fmt: skip
        with pytest.raises(InvalidRequest, match=words):
            RayCluster(**wrong)  # type: ignore[arg-type]


def test_a_bundle_that_somebody_else_uses_is_named(
    cluster: LocalCluster, driver: RayDriver, group: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "TAKE_S", 2.0)
    name = group({"GPU": 1})
    driver.hold(group.ids[0], 0, 1)  # type: ignore[attr-defined]
    with pytest.raises(EngineDied, match=rf"bundle 0 of the placement group '{name}' did not give 1 GPUs within 2 s"):
        in_group(cluster, name)
    driver.let_go()
    monkeypatch.undo()
    with in_group(cluster, name) as pool:
        assert len(devices(pool)) == 1


def test_what_is_killed_comes_back_in_its_bundle(cluster: LocalCluster, driver: RayDriver, group: Make) -> None:
    name = group(*[{"GPU": 1}] * 3)
    with in_group(cluster, name, 3) as pool:
        session = pool.session(seed=7)
        session.append(TEXT)
        expected, before = bits(pool.fork(session, 3, SAMPLED, snapshot="before")), devices(pool)
        for worker in pool.workers[:2]:
            pid = pid_of(pool, worker)
            os.kill(pid, signal.SIGKILL)
            until(lambda worker=worker, pid=pid: lives(pool, worker, pid))  # type: ignore[misc]
        assert devices(pool) == before
        killed = keepers(cluster, "BundleKeeper")
        assert len(killed) == 3
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        for worker in pool.workers:
            assert bits(pool.fork(session, 3, SAMPLED, worker=worker)) == expected
        until(lambda: len(set(keepers(cluster, "BundleKeeper")) - set(killed)) == 3)
        assert devices(pool) == before and not driver.can_take(group.ids[0], 0, 1, 0.5)  # type: ignore[attr-defined]


def test_a_group_that_is_removed_ends_no_round_and_takes_no_new_worker(
    cluster: LocalCluster, driver: RayDriver, group: Make
) -> None:
    name = f"group-{secrets.token_hex(4)}"
    made = driver.group(name, {"GPU": 1}, {"GPU": 1})
    with warnings.catch_warnings(record=True) as told, in_group(cluster, name, 1) as pool:
        warnings.simplefilter("always")
        expected = bits(pool.fork(pool.encode(TEXT), 2, SAMPLED, seed=3))
        driver.remove(made)
        until(lambda: any(f"the placement group '{name}' was removed" in str(one.message) for one in told))
        assert bits(pool.fork(pool.encode(TEXT), 2, SAMPLED, seed=3)) == expected
        with pytest.raises(NotFound, match="was removed"):
            pool.add_worker()
        assert len(nodes_of(pool)) >= 1 and len(pool.workers) == 1
