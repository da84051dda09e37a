"""KV by NIXL between daemons, where it is installed (`pip install nixl`), and what happens where it is not."""

from __future__ import annotations

import os
import secrets
import signal
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest
from ray_cluster import cluster_of, counts
from ray_daemons import STORE, Start, daemons, looked, pack
from ray_wire import recorded

import thaw
from thaw.cluster import RayCluster
from thaw.cluster.messages import PackSource, PulledPacks, PullPacks, ServeStore
from thaw.cluster.nixl_agent import LANDING, SLOT_BYTES
from thaw.cluster.peer import Peer
from thaw.core.errors import CorruptBlob, InvalidRequest, StorageFailed
from thaw.testing.laws.kit import until
from thaw.testing.laws.pool_kit import TEXT, bits

SAMPLED = thaw.Sampling(temperature=0.9, max_tokens=16, ignore_eos=True)
needs_nixl = pytest.mark.skipif(find_spec("nixl") is None, reason="NIXL is not installed: pip install nixl")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Start]:
    """Starts one, with NIXL if nothing else is said; all of them end with the test."""
    with daemons(tmp_path) as begin:
        yield lambda key, nixl=True: begin(key, nixl=nixl, lease_s=60.0)


def served(peer: Peer, tmp_path: Path) -> Path:
    folder = tmp_path / secrets.token_hex(4)
    folder.mkdir()
    peer.ask(ServeStore(uuid=STORE, folder=str(folder)))
    return folder


def pulled(peer: Peer, names: tuple[str, ...], host: str, port: int) -> PulledPacks:
    source = PackSource(key="a", host=host, port=port)
    return msgspec.convert(peer.ask(PullPacks(uuid=STORE, names=names, sources=(source,)), 120.0), PulledPacks)


@needs_nixl
def test_a_pack_is_pushed_by_nixl_and_hashed_where_it_lands(daemon: Start, tmp_path: Path) -> None:
    """Its bytes do not go over the connection: a listener there sees none of them."""
    first, address = daemon("a")
    second, other = daemon("b")
    assert address.no_nixl == other.no_nixl == ""
    folder = served(first, tmp_path)
    blobs = [os.urandom(3 * SLOT_BYTES * 4 + 5), os.urandom(100), b"x" * (1 << 20), os.urandom(1)]
    name = pack(folder, *blobs)
    there = Path(str(second.ask(ServeStore(uuid=STORE))))
    with recorded(address) as proxy:
        size = (folder / name).stat().st_size
        assert pulled(second, (name,), proxy.host, proxy.port).nbytes == size
        assert (there / name).read_bytes() == (folder / name).read_bytes()
        assert not any(proxy.has(blobs[0][at : at + 32]) for at in range(0, len(blobs[0]), 1 << 16))
    assert looked(first).pushed_nbytes == looked(first).sent_nbytes == looked(second).received_nbytes == size
    assert looked(second).num_fallbacks == 0


@needs_nixl
@pytest.mark.parametrize("sides", [(True, False), (False, True)])
def test_where_one_side_has_it_alone_kv_goes_over_tcp(daemon: Start, tmp_path: Path, sides: tuple[bool, bool]) -> None:
    first, address = daemon("a", sides[0])
    second, _ = daemon("b", sides[1])
    folder, there = served(first, tmp_path), Path(str(second.ask(ServeStore(uuid=STORE))))
    name = pack(folder, os.urandom(5 << 20))
    pulled(second, (name,), address.host, address.port)
    assert (there / name).read_bytes() == (folder / name).read_bytes()
    assert (looked(first).pushed_nbytes, looked(second).num_fallbacks) == (0, 0)


@needs_nixl
def test_one_wrong_byte_is_refused_and_nothing_is_kept(daemon: Start, tmp_path: Path) -> None:
    first, address = daemon("a")
    second, _ = daemon("b")
    folder, there = served(first, tmp_path), Path(str(second.ask(ServeStore(uuid=STORE))))
    name = pack(folder, os.urandom(5 << 20))
    whole = bytearray((folder / name).read_bytes())
    whole[-1] ^= 1
    (folder / name).write_bytes(whole)
    with pytest.raises(CorruptBlob):
        pulled(second, (name,), address.host, address.port)
    assert list(there.iterdir()) == [] and looked(second).num_refused == 2, "by NIXL, and once more over TCP"
    whole[-1] ^= 1
    (folder / name).write_bytes(whole)
    pulled(second, (name,), address.host, address.port)
    assert (there / name).read_bytes() == bytes(whole)


@needs_nixl
def test_more_packs_at_once_than_there_are_slots(daemon: Start, tmp_path: Path) -> None:
    first, address = daemon("a")
    second, _ = daemon("b")
    folder, there = served(first, tmp_path), Path(str(second.ask(ServeStore(uuid=STORE))))
    names = [pack(folder, os.urandom(SLOT_BYTES * 2 + number)) for number in range(len(LANDING) + 4)]
    with ThreadPoolExecutor(len(names)) as threads:
        done = list(threads.map(lambda name: pulled(second, (name,), address.host, address.port), names))
    assert sum(one.num_packs for one in done) == len(names)
    assert all((there / name).read_bytes() == (folder / name).read_bytes() for name in names)
    assert looked(second).num_fallbacks == 0 and looked(first).pushed_nbytes == looked(second).received_nbytes


@needs_nixl
def test_a_source_that_dies_in_the_middle_leaves_nothing_and_the_next_one_is_asked(
    daemon: Start, tmp_path: Path
) -> None:
    first, address = daemon("a")
    third, other = daemon("c")
    second, _ = daemon("b")
    folder, there = served(first, tmp_path), Path(str(second.ask(ServeStore(uuid=STORE))))
    third.ask(ServeStore(uuid=STORE, folder=str(folder)))
    name = pack(folder, os.urandom(256 << 20))
    with ThreadPoolExecutor(1) as thread:
        failed = thread.submit(pulled, second, (name,), address.host, address.port)
        until(lambda: any(there.iterdir()))
        os.kill(address.pid, signal.SIGKILL)
        with pytest.raises(StorageFailed):
            failed.result(120)
    assert list(there.iterdir()) == []
    pulled(second, (name,), other.host, other.port)
    assert (there / name).read_bytes() == (folder / name).read_bytes()


@needs_nixl
@pytest.mark.slow("a Ray cluster of two nodes")
def test_a_pool_sends_its_kv_by_nixl_and_its_results_are_the_same() -> None:
    with cluster_of(2) as cluster:
        found = []
        for transport in ("tcp", "nixl"):
            with cluster.pool(workers=2, cluster={"transport": transport}) as pool:
                for worker in pool.workers:
                    snapshot = pool.snapshot(pool.fork(pool.encode(TEXT * 4), 1, SAMPLED, worker=worker, seed=3)[0])
                    found += [bits(pool.fork(snapshot, 2, SAMPLED, worker=name)) for name in pool.workers]
                pushed = sum(one.pushed_nbytes for one in counts(pool).values())
                assert (pushed > 0) == (transport == "nixl")
                assert pushed == (0 if transport == "tcp" else sum(one.sent_nbytes for one in counts(pool).values()))
        assert len(found) == 8 and all(one == found[0] for one in found)


def test_a_node_without_it_says_so_and_uses_tcp(daemon: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = tmp_path / "hidden" / "nixl"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('hidden by a test')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hidden.parent), os.environ.get("PYTHONPATH", "")]))
    first, address = daemon("a")
    second, _ = daemon("b")
    assert "hidden by a test" in address.no_nixl and "pip install nixl" in address.no_nixl
    folder, there = served(first, tmp_path), Path(str(second.ask(ServeStore(uuid=STORE))))
    name = pack(folder, os.urandom(5 << 20))
    pulled(second, (name,), address.host, address.port)
    assert (there / name).read_bytes() == (folder / name).read_bytes() and looked(first).pushed_nbytes == 0


@pytest.mark.slow("starts Ray")
@pytest.mark.skipif(find_spec("nixl") is not None, reason="NIXL is installed here")
def test_a_pool_warns_where_it_was_asked_for_and_is_not_there() -> None:
    with cluster_of(1) as cluster, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with cluster.pool(cluster={"transport": "nixl"}) as pool:
            assert pool.fork(pool.encode(TEXT), 2, SAMPLED)[1].ok
        assert any("goes over TCP: NIXL is not installed" in str(one.message) for one in told)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="transport='rdma'"):
        RayCluster(transport="rdma")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="does not encrypt"):
        RayCluster(transport="nixl", tls=True)
