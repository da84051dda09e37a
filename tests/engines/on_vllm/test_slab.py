"""The arena's slab: what is given out never overlaps, and all of it comes back as one run."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from thaw.engines.served.worker.pinned_buffer import GRAIN, PinnedBuffer  # noqa: E402


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40 * GRAIN)), max_size=60), st.randoms())
def test_runs_never_overlap_and_come_back_whole(steps: list[tuple[bool, int]], dice: object) -> None:
    slab = PinnedBuffer(100 * GRAIN, pin=False)
    held: dict[int, tuple[int, int]] = {}
    for number, (takes, nbytes) in enumerate(steps):
        if takes or not held:
            found = slab.take(nbytes)
            if found is None:
                assert slab.largest < nbytes
                continue
            start, memory = found
            assert memory.numel() >= nbytes and start % GRAIN == 0
            memory[:nbytes] = number % 251
            held[start] = (nbytes, number % 251)
        else:
            start = dice.choice(sorted(held))  # type: ignore[attr-defined]
            slab.give_back(start, held.pop(start)[0])
        for start, (nbytes, mark) in held.items():
            assert bool((slab.memory[start : start + nbytes] == mark).all())
    for start, (nbytes, _) in held.items():
        slab.give_back(start, nbytes)
    assert slab.largest == 100 * GRAIN
