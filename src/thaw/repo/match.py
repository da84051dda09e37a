"""Match: the longest stored prefix of some tokens, as a point.

Every segment carries the hash of all tokens before its window, chained from the model's id. The longest window hash of
the query that any segment has proves (up to a hash collision) that so many tokens are equal; the tokens inside that
window are then compared one by one, so a match may end inside a segment.
"""

from __future__ import annotations

from collections.abc import Sequence

from thaw.core import prefix
from thaw.core.ids import CommitId, ObjectId, StateId
from thaw.core.objects import Commit, State
from thaw.core.prefix import WINDOW, common_prefix
from thaw.repo import resolve, timeline
from thaw.repo.resolve import ResolvedPoint
from thaw.store import Store


class Matcher:
    """Looks up prefixes in one store. Remembers which commit recorded which state; safe to share between threads."""

    def __init__(self) -> None:
        self._commits: dict[StateId, CommitId] = {}
        self._seen: set[CommitId] = set()

    def match(self, store: Store, models: Sequence[ObjectId], tokens: Sequence[int]) -> ResolvedPoint | None:
        """The longest stored prefix under any of `models`, or None when not even one token is stored."""
        best: tuple[int, StateId] | None = None
        for model in models:
            found = self._longest(store, model, tuple(tokens))
            if found is not None and (best is None or found[0] > best[0]):
                best = found
        if best is None:
            return None
        commit = self._commit_of(store, best[1])
        return None if commit is None else resolve.at(store, commit, token=best[0])

    def _longest(self, store: Store, model: ObjectId, tokens: tuple[int, ...]) -> tuple[int, StateId] | None:
        chains = prefix.chains(model, tokens)
        for k in reversed(range(len(chains))):
            start = k * WINDOW
            found = [state for _, state in store.find_segments(chains[k])]
            lengths = [(start + self._inside(store, state, tokens, start), state) for state in dict.fromkeys(found)]
            usable = [pair for pair in lengths if pair[0] and self._commit_of(store, pair[1]) is not None]
            if usable:
                return max(usable)
        return None

    @staticmethod
    def _inside(store: Store, state_id: StateId, tokens: tuple[int, ...], start: int) -> int:
        """Equal tokens from `start` on, within the window and the one token that has no KV yet."""
        end = start + WINDOW
        stored = timeline.read_window(store, store.get_as(state_id, State), start, end)
        return common_prefix(tokens[start:end], stored)

    def _commit_of(self, store: Store, state: StateId) -> CommitId | None:
        commit = self._commits.get(state)
        if commit is None or not store.has(commit):
            if commit is not None:
                self._commits.clear()
                self._seen.clear()
            for identifier in store.commits():
                if identifier not in self._seen:
                    self._seen.add(identifier)
                    self._commits[StateId(store.get_as(identifier, Commit).state)] = identifier
            commit = self._commits.get(state)
        return commit if commit is not None and store.has(commit) else None


def models_of(store: Store) -> list[ObjectId]:
    """Models that the commits under refs belong to."""
    states = [store.get_as(ref.target, Commit).state for ref in store.refs()]
    return list(dict.fromkeys(ObjectId(store.get_as(state, State).model) for state in states))
