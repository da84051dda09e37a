"""Prometheus series of the gateway, in text: what came, what was answered, and what was saved.

Saved tokens are those that the engine counted as cached; saved seconds are these at the rate at which the same engine
read the tokens that were not (only requests that read at least `MEASURABLE` tokens say something of it).
"""

from __future__ import annotations

from collections import defaultdict
from typing import TypeAlias

from thaw.gateway.asked import RequestOutcome

Labels: TypeAlias = tuple[tuple[str, str], ...]
MEASURABLE = 64
MAX_BRANCHES = 100
"""Of a tenant that have series of their own: clients name them."""
HELP: dict[str, tuple[str, str]] = {
    "thaw:requests_total": ("counter", "Requests by tenant, endpoint and status."),
    "thaw:requests_running": ("gauge", "Running requests, including streams."),
    "thaw:prompt_tokens_total": ("counter", "Prompt tokens."),
    "thaw:cached_tokens_total": ("counter", "Prompt tokens that were not recomputed."),
    "thaw:prefilled_tokens_total": ("counter", "Prompt tokens that were computed."),
    "thaw:generated_tokens_total": ("counter", "Tokens sampled."),
    "thaw:saved_seconds_total": ("counter", "Estimated seconds that computing the cached tokens would have taken."),
    "thaw:sources_total": ("counter", "What prompts continued from: an open session, a stored one, or nothing."),
    "thaw:stored_bytes_total": ("counter", "Bytes of KV written by commits."),
    "thaw:live_sessions": ("gauge", "Sessions kept open for follow-up requests."),
    "thaw:live_tokens": ("gauge", "Their tokens."),
    "thaw:engine_up": ("gauge", "By engine: 1 while it is up."),
    "thaw:engine_replaced": ("gauge", "By engine: how often it was replaced."),
    "thaw:engine_requests_running": ("gauge", "By engine: running requests."),
    "thaw:engine_live_sessions": ("gauge", "By engine: sessions kept open."),
    "thaw:engine_live_tokens": ("gauge", "By engine: their tokens."),
    "thaw:engine_cached_tokens_total": ("counter", "By engine: prompt tokens that were not recomputed."),
    "thaw:engine_prefilled_tokens_total": ("counter", "By engine: prompt tokens that were computed."),
    "thaw:engine_generated_tokens_total": ("counter", "By engine: tokens sampled."),
}


class Gauges:
    """Values as of now."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, Labels], float] = {}

    def set(self, name: str, value: float, **labels: str) -> None:
        self.values[name, tuple(sorted(labels.items()))] = value


class Metrics:
    """Counted in one event loop."""

    def __init__(self) -> None:
        self._counts: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        self._branches: defaultdict[str, set[str]] = defaultdict(set)
        self._read_tokens = 0
        self._read_s = 0.0

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        self._counts[name, tuple(sorted(labels.items()))] += value

    def done(self, tenant: str, branch: str | None, outcome: RequestOutcome) -> None:
        labels = {"tenant": tenant, "branch": self._branch(tenant, branch or "")}
        self.add("thaw:prompt_tokens_total", outcome.num_prompt, **labels)
        self.add("thaw:cached_tokens_total", outcome.num_cached, **labels)
        self.add("thaw:prefilled_tokens_total", outcome.num_prefilled, **labels)
        self.add("thaw:generated_tokens_total", len(outcome.token_ids), **labels)
        self.add("thaw:stored_bytes_total", outcome.nbytes, **labels)
        self.add("thaw:sources_total", tenant=tenant, source=outcome.source)
        engine = str(outcome.engine)
        self.add("thaw:engine_cached_tokens_total", outcome.num_cached, engine=engine)
        self.add("thaw:engine_prefilled_tokens_total", outcome.num_prefilled, engine=engine)
        self.add("thaw:engine_generated_tokens_total", len(outcome.token_ids), engine=engine)
        if outcome.num_prefilled >= MEASURABLE:
            self._read_tokens += outcome.num_prefilled
            self._read_s += outcome.ttft_s
        if self._read_tokens:
            saved = outcome.num_cached * self._read_s / self._read_tokens
            self.add("thaw:saved_seconds_total", saved, **labels)

    def _branch(self, tenant: str, branch: str) -> str:
        """Its label: conversations share one, and so do all branches of a tenant beyond the first `MAX_BRANCHES`."""
        if branch.startswith("conversations/"):
            return "conversations/*"
        known = self._branches[tenant]
        if len(known) < MAX_BRANCHES:
            known.add(branch)
        return branch if branch in known else "*"

    def text(self, gauges: Gauges) -> str:
        lines: list[str] = []
        counts = {**self._counts, **gauges.values}
        for name, (kind, help) in HELP.items():
            rows = {labels: value for (one, labels), value in counts.items() if one == name}
            lines += [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{_labels(labels)} {value:g}" for labels, value in sorted(rows.items())]
        return "\n".join(lines) + "\n"


def _labels(labels: Labels) -> str:
    shown = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels)
    return f"{{{shown}}}" if shown else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
