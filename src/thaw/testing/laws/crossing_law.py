"""Snapshots that cross: from one engine to another, or to one with other ranks. Bytes are equal; numerics are the
receiver's. `CrossingTests` is to be subclassed:

    here, there     two fixtures: engines of one model, of equal or of unequal kind
    tolerance       the largest difference of a log probability that their kernels may make; wrong KV must make more
    wrong           plans of wrong KV by name; a subclass may add its own
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from thaw.engines.base import Completion, Engine, HydratePlan
from thaw.testing.laws.bytes_law import blob_ids
from thaw.testing.laws.kit import Lab, greedy
from thaw.testing.plans import halves_swapped, mount_at, tampered


class CrossingTests:
    tolerance: ClassVar[float] = 0.25
    """Measured in bf16 on a random model that looks at its KV: under 0.1 between engines, 0.02 between rank counts."""

    @pytest.fixture
    def here(self) -> Engine:
        raise NotImplementedError("give a fixture `here`: an engine")

    @pytest.fixture
    def there(self) -> Engine:
        raise NotImplementedError("give a fixture `there`: another engine of the same model")

    @pytest.fixture
    def lab(self, tmp_path: Path) -> Lab:
        return Lab(mount_at(tmp_path / "packs"))

    def wrong(self, plan: HydratePlan) -> dict[str, HydratePlan]:
        return {"halves of every blob exchanged": tampered(plan, halves_swapped)}

    def test_the_identity_is_the_same(self, here: Engine, there: Engine) -> None:
        assert here.identity() == there.identity()

    @pytest.mark.parametrize("way", ["from here to there", "from there to here"])
    def test_bytes_are_equal_and_the_logprobs_close(self, here: Engine, there: Engine, lab: Lab, way: str) -> None:
        """And wrong KV is not close: the negative control of the tolerance."""
        giver, taker = (here, there) if way == "from here to there" else (there, here)
        session = lab.begin(giver, 700)
        plan = lab.plan(lab.capture(giver, session), at=700)
        hydrated = lab.hydrate(taker, plan)
        assert hydrated.proof.hit and hydrated.proof.num_cached_tokens == plan.num_kv
        given, taken = lab.capture(giver, lab.twin(giver, session, at=699)), lab.capture(taker, hydrated.session)
        assert blob_ids(given)[:2] == blob_ids(taken)[:2] and len(blob_ids(taken)) == 3
        own = top(lab.one(giver, lab.twin(giver, session, at=700), greedy(1, logprobs=20)))
        child = lab.one(taker, hydrated.session, greedy(1, logprobs=20))
        assert child.num_cached_tokens >= 699
        difference = largest(own, top(child))
        moved = {
            name: largest(own, top(lab.one(taker, lab.hydrate(taker, bad).session, greedy(1, logprobs=20))))
            for name, bad in self.wrong(plan).items()
        }
        print(f"{way}: largest difference of log probabilities {difference:.4f}; with wrong KV {moved}")
        assert difference < self.tolerance < min(moved.values())


def top(out: Completion) -> dict[int, float]:
    """The log probabilities of the first token's likeliest."""
    assert out.top_logprobs is not None
    return dict(out.top_logprobs[0])


def largest(one: dict[int, float], other: dict[int, float]) -> float:
    """Of the differences between tokens that both have; infinite where they share none."""
    both = one.keys() & other.keys()
    return max((abs(one[token] - other[token]) for token in both), default=float("inf"))
