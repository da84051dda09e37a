"""What lies in which slot of SGLang's pool, by number: equal tokens may have unequal bits, equal numbers never have.

A number is given to every token that a request computes or that is read from a pack. It goes with the token through
every slot that it is loaded into, the same on all ranks."""

from __future__ import annotations

import torch

from thaw.engines.sglang.scheduler.rank_consensus import RankConsensus


class SlotContents:
    """A *chain* is the numbers [num_tokens], int64, of a session's tokens. Slots are int64 too, on any device."""

    def __init__(self, num_slots: int, agreement: RankConsensus) -> None:
        self._in_slot = torch.zeros(num_slots, dtype=torch.int64)
        self._next = 1
        self._agreement = agreement

    def fresh(self, count: int) -> torch.Tensor:
        """Numbers that nothing else has."""
        chain = torch.arange(self._next, self._next + count)
        self._next += count
        return chain

    def of(self, slots: torch.Tensor) -> torch.Tensor:
        return self._in_slot[slots.cpu()]

    def put(self, slots: torch.Tensor, chain: torch.Tensor | int) -> None:
        self._in_slot[slots.cpu()] = chain

    def clear(self, slots: torch.Tensor | None = None) -> None:
        """These slots hold nobody's content; None: no slot does."""
        if slots is None:
            self._in_slot.zero_()
        else:
            self.put(slots, 0)

    def are(self, slots: torch.Tensor, chain: torch.Tensor) -> bool:
        """Whether the slots hold the chain's first tokens, on every rank."""
        return bool(self._agreement.least(torch.equal(self.of(slots), chain[: len(slots)])))

    def own_length(self, slots: torch.Tensor, chain: torch.Tensor) -> int:
        """How many of the slots, from the first, hold the chain's content, on every rank."""
        return self._agreement.least(equal_length(self.of(slots), chain))


def equal_length(one: torch.Tensor, two: torch.Tensor) -> int:
    """The length of what two chains begin with alike."""
    count = min(len(one), len(two))
    unequal = (one[:count] != two[:count]).nonzero()
    return int(unequal[0]) if len(unequal) else count


def empty_chain() -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64)
