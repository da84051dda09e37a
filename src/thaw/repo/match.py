"""Match: the longest stored prefix of some tokens, as a point.

Every segment carries the hash of all tokens before its window, chained from the model's id. The longest window hash of
the query that any segment has proves (up to a hash collision) that so many tokens are equal; the store gives the states
that are nearest to it inside that window, whose tokens are then compared one by one, so a match may end inside a
segment. No more is read in a repository of many commits than in one of few. The hashes of a namespace are its own, so
that what others have stored is neither found nor looked at. On a model with windows or point states a match ends where
its commit can be continued from.
"""

from __future__ import annotations

from collections.abc import Sequence

from thaw.core import prefix
from thaw.core.cache import keeps_all
from thaw.core.identity import ModelIdentity
from thaw.core.ids import CommitId, ObjectId, StateId
from thaw.core.objects import State
from thaw.core.prefix import WINDOW, common_prefix
from thaw.repo import cover, resolve, timeline
from thaw.repo.resolve import ResolvedPoint
from thaw.store import Store


def match(store: Store, models: Sequence[ObjectId], tokens: Sequence[int]) -> ResolvedPoint | None:
    """The longest stored prefix in this namespace under any of `models`; None when not even one token is stored."""
    best: tuple[int, CommitId] | None = None
    for model in models:
        found = _longest(store, model, tuple(tokens))
        if found is not None and (best is None or found[0] > best[0]):
            best = found
    return None if best is None else resolve.at(store, best[1], token=best[0])


def _longest(store: Store, model: ObjectId, tokens: tuple[int, ...]) -> tuple[int, CommitId] | None:
    """How many tokens, and the newest commit of a state that has them. Where states with more in common can be gone on
    from at fewer tokens only, those that the store names are compared, not all."""
    chains = prefix.chains(model, tokens, store.namespace)
    best: tuple[int, CommitId] | None = None
    for k in reversed(range(len(chains))):
        start = k * WINDOW
        if best is not None and best[0] >= start + WINDOW:
            break
        found = store.nearest(chains[k], tokens[start : start + WINDOW])
        lengths = ((start + _inside(store, state, tokens, start), state) for state in found)
        for length, state in sorted(lengths, reverse=True):
            if length <= (best[0] if best else 0):
                break
            commits = store.recorders(state)
            length = _resumable(store, state, length, len(tokens)) if commits else 0
            if length > (best[0] if best else 0):
                best = length, commits[0]
    return best


def _resumable(store: Store, state_id: StateId, length: int, num_wanted: int) -> int:
    """The most of the state's first `length` tokens that can be gone on from, or 0. Of `num_wanted` tokens those behind
    a point are new ones."""
    state = store.get_as(state_id, State)
    if keeps_all(store.get_as(state.model, ModelIdentity).groups):
        return length
    line = timeline.read(store, state)
    found = cover.resumable(line)
    new = [n for n in cover.with_new_tokens(line, found) if n < num_wanted]
    return max((n for n in (*found, *new) if n <= length), default=0)


def _inside(store: Store, state_id: StateId, tokens: tuple[int, ...], start: int) -> int:
    """Equal tokens from `start` on, within the window and the one token that has no KV yet."""
    end = start + WINDOW
    stored = timeline.read_window(store, store.get_as(state_id, State), start, end)
    return common_prefix(tokens[start:end], stored)
