"""Which weights KV is of, alike on all ranks: what one of them sees has changed for all."""

from __future__ import annotations

from thaw.core.errors import StaleSession, StorageFailed
from thaw.engines.served.worker.weights_probe import WeightsSample
from thaw.engines.sglang.scheduler.rank_consensus import RankConsensus
from thaw.engines.sglang.scheduler.records import RankRecord


class WeightsEpochs:
    """`weights`: None where the model was not found. `watching`: whether they are looked at."""

    def __init__(self, weights: WeightsSample | None, agreement: RankConsensus) -> None:
        self.weights = weights
        self.watching = True
        self._agreement = agreement

    def now(self) -> int:
        """Of all ranks; a collective."""
        epoch = -self._agreement.least(-self.seen())
        if self.weights is not None:
            self.weights.epoch = epoch
        return epoch

    def seen(self) -> int:
        """As this rank alone sees it."""
        if self.weights is None:
            return 0
        return self.weights.look() if self.watching else self.weights.epoch


def require_usable(record: RankRecord, epoch: int) -> None:
    """Raises what speaks against continuing from the record under the weights of `epoch`."""
    if record.kept.epoch != epoch:
        raise StaleSession(
            f"the session's KV is of weights epoch {record.kept.epoch}; the engine's weights changed (epoch "
            f"{epoch}). {StaleSession.way_out}"
        )
    if record.kept.broken:
        raise StorageFailed(f"the session's KV could not be kept: {record.kept.broken}")
