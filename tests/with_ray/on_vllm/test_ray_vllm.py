"""A pool of real vLLMs on two Ray nodes: what one has captured goes on in the other, as in a local pool."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ray_cluster import cluster_of, counts, nodes_of
from ray_harm import line_nbytes

import thaw
from thaw.core.errors import CorruptBlob
from thaw.data.reader import read_header
from thaw.pool import BranchResult, ForkPool
from thaw.testing.laws.pool_kit import bits

for package in ("vllm", "ray"):
    pytest.importorskip(package)
pytestmark = [pytest.mark.slow("two vLLMs on Ray, and a local one"), pytest.mark.timeout(1800)]

SAMPLED = thaw.Sampling(temperature=0.9, max_tokens=24, ignore_eos=True)
BEGUN = thaw.Sampling(temperature=0.9, max_tokens=5, ignore_eos=True)
PROMPTS = ["Why?", "How?", "Who?", "When?"]
TEXTS = [f"Document {number}, which every branch needs, told at some length. " * 14 for number in range(2)]


class Stand(NamedTuple):
    """`local`: for each text, the bits of its trunk and of a round from there, in a pool of one local process.
    `cluster` may end and begin again at the same address."""

    pool: ForkPool
    local: list[list[Any]]
    cluster: contextlib.ExitStack
    port: int


def trunk(pool: ForkPool, text: str, worker: str) -> BranchResult:
    """A session that has read a text in that worker, and written a little of its own."""
    return pool.fork(pool.encode(text), 1, BEGUN, worker=worker, seed=7)[0]


def num_tokens(result: BranchResult) -> int:
    assert result.session is not None
    return result.session.num_tokens


@pytest.fixture(scope="module")
def stand(vllm_options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    with contextlib.ExitStack() as stack:
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        environment.setenv("THAW_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        with ForkPool("vllm", workers=1, **vllm_options) as local:
            begun = [trunk(local, text, local.workers[0]) for text in TEXTS]
            expected = [bits([one, *local.fork(one, PROMPTS, SAMPLED)]) for one in begun]
        ray = stack.enter_context(contextlib.ExitStack())
        cluster = ray.enter_context(cluster_of(2, port))
        pool = stack.enter_context(cluster.pool("vllm", workers=2, **vllm_options))
        yield Stand(pool, expected, ray, port)


def workers_by_place(pool: ForkPool) -> dict[bool, str]:
    """The worker of the client's node (True), and that of the other one."""
    return {pool._fleet.named(name).life.host.node.is_home: name for name in pool.workers}  # type: ignore[union-attr]


def nothing_was_prefilled_again(pool: ForkPool, results: list[BranchResult], num_point: int) -> None:
    """By vLLM's own counts: of each branch's prompt only what was appended to the point, and one token of the point at
    most, went through the model."""
    for result, prompt in zip(results, PROMPTS, strict=True):
        assert result.restore is not None and result.restore.hit and result.restore.num_recomputed_tokens == 0
        assert result.decision is not None and result.decision.num_prefilled_tokens == 0
        assert result.usage is not None and result.num_cached_tokens >= num_point - 1
        assert result.usage.num_prefilled_tokens <= len(pool.encode(prompt, first=False)) + 1


def test_what_one_node_captured_goes_on_in_the_other_as_in_a_local_pool(stand: Stand) -> None:
    pool = stand.pool
    places = workers_by_place(pool)
    assert len(places) == 2, "one engine on each node"
    before, lines = counts(pool), line_nbytes(pool)
    for text, local, home in zip(TEXTS, stand.local, (True, False), strict=True):
        begun = trunk(pool, text, places[home])
        assert begun.decision is not None and begun.decision.num_prefilled_tokens == len(pool.encode(text))
        moved = pool.fork(pool.snapshot(begun), PROMPTS, SAMPLED, worker=places[not home])
        assert (begun.worker, {result.worker for result in moved}) == (places[home], {places[not home]})
        assert bits([begun, *moved]) == local
        nothing_was_prefilled_again(pool, moved, num_tokens(begun))
        decision = moved[0].decision
        assert decision is not None and decision.action == "hydrate"
        assert (decision.tier, bool(decision.link)) == (("node", True) if home else ("arena", False))
    after = counts(pool)
    moved_nbytes = {
        node.is_home: (
            after[node.key].sent_nbytes - before[node.key].sent_nbytes,
            after[node.key].received_nbytes - before[node.key].received_nbytes,
        )
        for node in nodes_of(pool)
    }
    assert moved_nbytes[True] == moved_nbytes[False][::-1], "what one sent the other received"
    kv = pool._planner._token_nbytes * min(len(pool.encode(text)) for text in TEXTS)
    assert min(moved_nbytes[True]) > kv
    assert line_nbytes(pool) - lines < kv / 4, "and none of it came over the engines' lines to the client"
    assert pool._backend.nodes.object_store_nbytes() == 0  # type: ignore[attr-defined]


def test_without_the_kv_the_other_node_prefills_all_of_it(stand: Stand) -> None:
    """The control of the counts: the same kind of text, of which nothing was captured."""
    pool = stand.pool
    ids = pool.encode("Nobody has read this one yet. " * 30)
    far = pool.fork(ids, PROMPTS, SAMPLED, worker=workers_by_place(pool)[False], snapshot="never")
    assert far[0].decision is not None and far[0].decision.action == "prefill"
    assert far[0].decision.num_prefilled_tokens == len(ids)
    assert all(result.restore is None for result in far)


def test_another_point_gives_the_other_node_other_bits(stand: Stand) -> None:
    """The control of the bits: one token less of the same text, with the same seeds."""
    pool = stand.pool
    places = workers_by_place(pool)
    begun = trunk(pool, TEXTS[0], places[True])
    snapshot = pool.snapshot(begun)
    whole, shorter = (
        pool.fork(snapshot, PROMPTS, SAMPLED, worker=places[False], seeds=[1, 2, 3, 4], at=at)
        for at in (num_tokens(begun), num_tokens(begun) - 1)
    )
    assert all(one != other for one, other in zip(bits(whole), bits(shorter), strict=True))


def test_a_wrong_byte_is_refused_before_the_other_engine_reads_it(stand: Stand) -> None:
    pool = stand.pool
    places = workers_by_place(pool)
    snapshot = pool.snapshot(trunk(pool, "A text that is damaged on its way. " * 20, places[True]))
    whole = {path: path.read_bytes() for path in pool._arena.store.packs.glob("*.safetensors") if first_blob(path)}
    for path, data in whole.items():
        at = first_blob(path)
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    damaged = pool.fork(snapshot, PROMPTS, SAMPLED, worker=places[False], errors="return")
    assert [type(result.error) for result in damaged] == [CorruptBlob] * len(PROMPTS)
    for path, data in whole.items():
        path.write_bytes(data)
    assert all(result.ok for result in pool.fork(snapshot, PROMPTS, SAMPLED, worker=places[False]))


def first_blob(path: Path) -> int:
    """Where the first tensor of KV begins in a pack; 0 where there is none."""
    return next((one.offset for one in read_header(path).entries if not one.is_object and not one.is_pad), 0)


def test_the_engines_outlive_all_of_ray_and_are_joined_again(stand: Stand) -> None:
    """Last in its module: the cluster is another one then."""
    pool, nodes = stand.pool, stand.pool._backend.nodes  # type: ignore[attr-defined]
    begun = trunk(pool, TEXTS[0], pool.workers[0])
    snapshot, local = pool.snapshot(begun), stand.local[0][1:]
    done = pool.fork(snapshot, PROMPTS, SAMPLED)
    workers = [(one.name, one.pid, one.incarnation) for one in pool.stats().workers]
    stand.cluster.close()
    assert bits(done) == local, "what was received stays"
    for worker in pool.workers:
        again = pool.fork(snapshot, PROMPTS, SAMPLED, worker=worker)
        assert bits(again) == local, "and rounds go on"
        nothing_was_prefilled_again(pool, again, num_tokens(begun))
    stand.cluster.enter_context(cluster_of(2, stand.port))
    ends = time.monotonic() + 300
    while nodes.num_joins < 2 or not all(node.kept for node in nodes_of(pool)):
        assert time.monotonic() < ends, "the pool did not join Ray again"
        time.sleep(0.2)
    asked = nodes.num_calls
    assert len(counts(pool)) == 2 and nodes.num_calls == asked + 2, "the keepers found the daemons that run"
    assert bits(pool.fork(snapshot, PROMPTS, SAMPLED)) == local
    assert [(one.name, one.pid, one.incarnation) for one in pool.stats().workers] == workers, "0 boots"
