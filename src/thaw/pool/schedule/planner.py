"""The planner: how a worker should come to have a point, and what that will cost. Pure decisions over measured rates.

    fork       it is there: a live session, or a resident one (`held_here`)
    hydrate    its KV is stored: loaded from the arena, from spilled packs or from the repository's
    prefill    its tokens run through the model

`exact` forks or hydrates where KV is stored; `fast` takes what is expected sooner. Plain tokens have no KV to be exact
about: what is stored of them is loaded, the rest is prefilled.
"""

from __future__ import annotations

from thaw.pool.schedule.fork_point import ForkPoint
from thaw.pool.schedule.job import KvLost
from thaw.pool.schedule.rates import Rates
from thaw.pool.values import Decision, LoadPolicy, Tier
from thaw.pool.workers.worker import Incarnation


class Planner:
    def __init__(self, rates: Rates, token_nbytes: int) -> None:
        self.rates = rates
        self._token_nbytes = token_nbytes

    def decide(self, point: ForkPoint, worker: str, policy: LoadPolicy, link: str = "") -> Decision:
        """For a worker that has not got it; `point` is its version of this moment. Over `link` it would come from
        another node. Raises `KvLost` where the KV died with its worker and prefilling was not allowed."""
        tier = _tier(point, link)
        costs = self.rates.costs(tier, self._token_nbytes * point.at, point.at, link)
        loadable = point.stored is not None or point.held is not None
        if loadable and (policy == "exact" or not _sooner(costs)):
            reason = "its KV is stored" if policy == "exact" else "loading is expected sooner than prefilling"
            if policy == "fast" and len(costs) < 2:
                reason = "its KV is stored; nothing was measured yet that says prefilling is sooner"
            return Decision(
                action="hydrate", tier=tier, worker=worker, policy=policy, reason=reason,
                predicted_s=costs.get("hydrate"), alternatives=costs, link=link,
            )  # fmt: skip
        if point.plain:
            reason = "nothing is stored of these tokens"
        elif loadable:
            reason = "prefilling is expected sooner than loading"
        elif policy == "fast":
            reason = "its KV died with its worker before it was captured"
        else:
            raise KvLost(
                "the session's worker died before its KV was captured, and policy 'exact' allows no prefilling again. "
                "Allow it (policy='fast'), or have it captured first (snapshot='before', pool.snapshot)"
            )
        return Decision(
            action="prefill", tier="none", worker=worker, policy=policy, reason=reason,
            predicted_s=costs.get("prefill"), alternatives=costs,
        )  # fmt: skip

    def cost(self, point: ForkPoint, life: Incarnation) -> float:
        """Expected seconds until `life` has the point; infinite guesses are avoided: unknown counts as a second."""
        if point.lives_in(life) or life.has(point.key):
            return 0.0
        costs = self._costs(point, life.link(point.stored))
        return costs.get("hydrate" if point.stored is not None or point.held is not None else "prefill", 1.0)

    def spread(self, point: ForkPoint, branches: int, tokens: int, lives: list[Incarnation]) -> int:
        """Over how many workers `branches` should go: where the shorter decode is expected to win over the loads."""
        best, best_s = 1, None
        holders = sum(self.cost(point, life) == 0.0 for life in lives)
        far = max((self._costs(point, life.link(point.stored)).get("hydrate", 1.0) for life in lives), default=1.0)
        for k in range(1, min(len(lives), branches) + 1):
            step = self.rates.step_s(-(-branches // k))
            if step is None:
                return 1
            load = 0.0 if k <= max(holders, 1) else far
            total = load + step * tokens
            if best_s is None or total < best_s * 0.95:  # a tie goes to fewer workers
                best, best_s = k, total
        return best

    def _costs(self, point: ForkPoint, link: str) -> dict[str, float]:
        return self.rates.costs(_tier(point, link), self._token_nbytes * point.at, point.at, link)


def held_here(worker: str, policy: LoadPolicy, measured_s: float) -> Decision:
    """There is nothing to decide: a session at the point lives in the worker."""
    return Decision(
        action="fork", tier="engine", worker=worker, policy=policy, reason="its KV is in this worker",
        predicted_s=0.0, measured_s=measured_s,
    )  # fmt: skip


def _tier(point: ForkPoint, link: str) -> Tier:
    """Where it lies, seen from a worker to which it would come over `link`; one that only lives would go through the
    arena."""
    if link:
        return "node"
    return "arena" if point.stored is None else point.stored.where.tier


def _sooner(costs: dict[str, float]) -> bool:
    """Whether prefilling is expected to be sooner than loading; never while one of them is unknown."""
    return "prefill" in costs and "hydrate" in costs and costs["prefill"] < costs["hydrate"]
