"""The planner: how a worker should come to have a trunk, and what that will cost. Pure decisions over measured rates.

    fork       it is there: a live session, or a resident one
    hydrate    its KV is stored: loaded from the arena, from spilled packs or from the repository's
    prefill    its tokens run through the model

`exact` forks or hydrates where KV is stored; `fast` takes what is expected sooner. Plain tokens have no KV to be exact
about: what is stored of them is loaded, the rest is prefilled.
"""

from __future__ import annotations

import msgspec

from thaw.pool.schedule.fork_point import ForkPoint
from thaw.pool.schedule.job import KvLost
from thaw.pool.schedule.rates import Rates
from thaw.pool.values import Action, Decision, LoadPolicy, Tier
from thaw.pool.workers.worker import Incarnation


class Planner:
    def __init__(self, rates: Rates, token_nbytes: int) -> None:
        self.rates = rates
        self._token_nbytes = token_nbytes

    def decide(self, trunk: ForkPoint, life: Incarnation, policy: LoadPolicy) -> Decision:
        """Raises `KvLost` where the KV died with its worker and prefilling was not allowed."""
        if trunk.lives_in(life) or life.has(trunk.key):
            return self._decision("fork", "engine", life, policy, "its KV is in this worker", 0.0, {})
        costs = self._costs(trunk, life)
        loadable = trunk.stored is not None or trunk.alive
        if loadable and (policy == "exact" or not _sooner(costs)):
            reason = "its KV is stored" if policy == "exact" else "loading is expected sooner than prefilling"
            if policy == "fast" and len(costs) < 2:
                reason = "its KV is stored; nothing was measured yet that says prefilling is sooner"
            found = self._decision(
                "hydrate", self._tier(trunk, life), life, policy, reason, costs.get("hydrate"), costs
            )
            return msgspec.structs.replace(found, link=life.link(trunk.stored))
        if trunk.plain:
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
        return self._decision("prefill", "none", life, policy, reason, costs.get("prefill"), costs)

    def cost(self, trunk: ForkPoint, life: Incarnation) -> float:
        """Expected seconds until `life` has the trunk; infinite guesses are avoided: unknown counts as a second."""
        if trunk.lives_in(life) or life.has(trunk.key):
            return 0.0
        costs = self._costs(trunk, life)
        return costs.get("hydrate" if trunk.stored is not None or trunk.alive else "prefill", 1.0)

    def spread(self, trunk: ForkPoint, branches: int, tokens: int, lives: list[Incarnation]) -> int:
        """Over how many workers `branches` should go: where the shorter decode is expected to win over the loads."""
        best, best_s = 1, None
        holders = sum(self.cost(trunk, life) == 0.0 for life in lives)
        far = max((self._costs(trunk, life).get("hydrate", 1.0) for life in lives), default=1.0)
        for k in range(1, min(len(lives), branches) + 1):
            step = self.rates.step_s(-(-branches // k))
            if step is None:
                return 1
            load = 0.0 if k <= max(holders, 1) else far
            total = load + step * tokens
            if best_s is None or total < best_s * 0.95:  # a tie goes to fewer workers
                best, best_s = k, total
        return best

    def _costs(self, trunk: ForkPoint, life: Incarnation) -> dict[str, float]:
        load_s = self.rates.load_s(self._tier(trunk, life), self._token_nbytes * trunk.at, life.link(trunk.stored))
        found = {"hydrate": load_s, "prefill": self.rates.prefill_s(trunk.at)}
        return {name: seconds for name, seconds in found.items() if seconds is not None}

    @staticmethod
    def _tier(trunk: ForkPoint, life: Incarnation) -> Tier:
        """Where it lies, seen from that worker; one that only lives would go through the arena."""
        if life.link(trunk.stored):
            return "node"
        return "arena" if trunk.stored is None else trunk.stored.where.tier

    @staticmethod
    def _decision(
        action: Action, tier: Tier, life: Incarnation, policy: LoadPolicy, reason: str, predicted: float | None,
        costs: dict[str, float],
    ) -> Decision:  # fmt: skip
        return Decision(
            action=action, tier=tier, worker=life.name, policy=policy, reason=reason, predicted_s=predicted,
            alternatives=costs,
        )  # fmt: skip


def _sooner(costs: dict[str, float]) -> bool:
    """Whether prefilling is expected to be sooner than loading; never while one of them is unknown."""
    return "prefill" in costs and "hydrate" in costs and costs["prefill"] < costs["hydrate"]
