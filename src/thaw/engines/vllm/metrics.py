"""thaw's counts in vLLM's own metrics: /metrics of the server, its log line, its Ray wrappers; nothing to scrape anew.

Both sides of the connector say what has changed since they were last asked, so vLLM may sum over ranks, steps and
intervals as it likes. A gauge is the sum of its changes.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "captures": "Sessions written into packs.",
    "hydrates": "Sessions read from packs.",
    "forks": "Requests that went on from another session's KV.",
    "refused": "Requests and commands of thaw's that were refused.",
    "preempted": "Preemptions of thaw's requests; each was saved and loaded again.",
    "split_groups": "Batches of children whose members did not all begin in one step.",
    "shuffled_groups": "Batches of children whose requests did not come in the order of the batch.",
    "loaded_tokens": "Tokens whose KV thaw loaded into the engine's blocks.",
    "hit_tokens": "Tokens of thaw's requests whose KV still was in the engine's blocks.",
    "state_copies": "Recurrent states that were copied out of the engine's blocks.",
    "reader_loads": "Sessions read from packs by processes beside the workers.",
    "reader_waits": "Times that a worker waited for these processes.",
}
GAUGES = {
    "records": "Sessions whose KV the engine keeps.",
    "pinned_blocks": "Blocks held by pins.",
    "arena_nbytes": "Bytes of sessions' KV in the workers' arenas, the spilled ones included.",
    "spilled_nbytes": "Bytes of sessions' KV beyond the workers' arenas, in files.",
}


class Changes:
    """What has changed of some counts since this was asked last."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def since(self, now: dict[str, int]) -> ThawStats | None:
        if now == self._told:
            return None
        news = {name: value - self._told.get(name, 0) for name, value in now.items()}
        self._told = dict(now)
        return ThawStats({name: change for name, change in news.items() if change})


class ThawStats(KVConnectorStats):
    """Changes by a count's name."""

    def reset(self) -> None:
        self.data: dict[str, int] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, change in other.data.items():
            self.data[name] = self.data.get(name, 0) + change
        return self

    def reduce(self) -> dict[str, int | float]:
        """For the server's log: what happened since its last line."""
        return {f"thaw_{name}": self.data[name] for name in COUNTERS if self.data.get(name)}

    def is_empty(self) -> bool:
        return not any(self.data.values())


class ThawPromMetrics(KVConnectorPromMetrics):
    """`vllm:thaw_<count>_total` for the counters, `vllm:thaw_<count>` for the gauges, by model and engine as vLLM's."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter, gauge = metric_types[Counter], metric_types[Gauge]
        made = {
            name: counter(name=f"vllm:thaw_{name}", documentation=text, labelnames=labelnames)
            for name, text in COUNTERS.items()
        }
        for name, text in GAUGES.items():
            made[name] = gauge(
                name=f"vllm:thaw_{name}", documentation=text, labelnames=labelnames, multiprocess_mode="sum"
            )
        self._metrics = {
            (engine, name): metric.labels(*values)
            for engine, values in per_engine_labelvalues.items()
            for name, metric in made.items()
        }
        self._level = dict.fromkeys(((engine, name) for engine in per_engine_labelvalues for name in GAUGES), 0)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, change in transfer_stats_data.items():
            key = (engine_idx, name)
            if name in GAUGES:
                self._level[key] += change
                self._metrics[key].set(self._level[key])
            elif name in COUNTERS:
                self._metrics[key].inc(change)
