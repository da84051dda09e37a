"""Which sessions begin with the same stored KV: loaded beside one another they share it, as their forks did."""

from __future__ import annotations

from collections.abc import Sequence

from thaw.core.errors import ThawError
from thaw.core.ids import StateId
from thaw.repo.timeline import read_entries, read_state
from thaw.store import Store


def trunks(store: Store, states: Sequence[StateId]) -> list[int | None]:
    """For each state the first one, of those before it, that begins with the most of the same stored segments."""
    tree: dict[tuple[int, str], tuple[int, int]] = {}  # by node and segment, the next node and whose it was first
    found: list[int | None] = []
    for at, state in enumerate(states):
        node, trunk = 0, None
        for segment in _segments(store, state):
            if (node, segment) in tree:
                node, trunk = tree[node, segment]
            else:
                new = len(tree) + 1
                tree[node, segment] = new, at
                node = new
        found.append(trunk)
    return found


def _segments(store: Store, state: StateId) -> list[str]:
    """Of what is damaged none: opening it says so."""
    try:
        return [one.segment for one in read_entries(store, read_state(store, state))]
    except ThawError:
        return []
