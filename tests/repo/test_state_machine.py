"""Random histories of commit, fork, run, tag, adopt, delete, rename and gc against a simple model.

The model is three dicts: commits (tokens and parents), branches, tags. What the repository says must equal it after
every step, and greedy tokens after any hydrated point must equal those after a plain prefill of the same tokens: the
fake engine reads its KV to choose them, so one wrong byte would show. The soak has more histories, and longer ones.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import thaw
from thaw import Sampling
from thaw.core.errors import NotFound, RefConflict
from thaw.core.objects import State
from thaw.core.prefix import common_prefix
from thaw.engines.base import Engine
from thaw.repo import CommitConflict, CommitResult, Repository, Session

SOAK = os.environ.get("THAW_SOAK") == "1"
NAMES = st.sampled_from(["main", "a", "b", "feature/c"])
TAGS = st.sampled_from(["v1", "v2"])
PIECES = st.tuples(st.sampled_from("abc"), st.integers(1, 300))
INDEX = st.integers(0, 1 << 16)
MAX_SESSIONS = 6


class History(RuleBasedStateMachine):
    engine: Engine
    repo: Repository

    @initialize()
    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="thaw-history-"))
        self.engine = thaw.load_engine("fake")
        self.repo = thaw.open(self.folder / "r", engine=self.engine)
        self.commits: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.live: list[tuple[Session, tuple[int, ...]]] = []

    # -- sessions

    @precondition(lambda self: len(self.live) < MAX_SESSIONS)
    @rule(seed=st.integers(0, 9), piece=PIECES)
    def begin(self, seed: int, piece: tuple[str, int]) -> None:
        s = self.repo.session(seed=seed)
        s.append(piece[0] * piece[1])
        self.live.append((s, tuple([ord(piece[0])] * piece[1])))

    @precondition(lambda self: self.live)
    @rule(i=INDEX, piece=PIECES)
    def append(self, i: int, piece: tuple[str, int]) -> None:
        s, tokens = self._live(i)
        s.append(piece[0] * piece[1])
        self._now(i, (*tokens, *[ord(piece[0])] * piece[1]))

    @precondition(lambda self: self.live)
    @rule(i=INDEX, n=st.integers(1, 40), greedy=st.booleans())
    def run(self, i: int, n: int, greedy: bool) -> None:
        s, tokens = self._live(i)
        out = s.generate("", Sampling(temperature=0.0 if greedy else 1.0, max_tokens=n, ignore_eos=True))
        self._now(i, (*tokens, *out.token_ids))

    @precondition(lambda self: self.live and len(self.live) < MAX_SESSIONS)
    @rule(i=INDEX, n=st.integers(1, 3), at=st.none() | INDEX, replay=st.booleans())
    def fork(self, i: int, n: int, at: int | None, replay: bool) -> None:
        s, tokens = self._live(i)
        k = None if at is None else 1 + at % len(tokens)
        for kid in s.fork(n, at=k, replay=replay):
            self.live.append((kid, tokens if k is None else tokens[:k]))

    @precondition(lambda self: self.commits and len(self.live) < MAX_SESSIONS)
    @rule(i=INDEX, at=st.none() | INDEX)
    def hydrate(self, i: int, at: int | None) -> None:
        commit = self._commit(i)
        tokens = self.commits[commit][0]
        k = len(tokens) if at is None else 1 + at % len(tokens)
        s = self.repo.session(f"{commit}:token={k}")
        assert s.proof is not None and s.proof.hit and s.proof.num_cached_tokens == s.num_kv
        self.live.append((s, tokens[:k]))

    @precondition(lambda self: self.live)
    @rule(i=INDEX, park=st.booleans())
    def put_away(self, i: int, park: bool) -> None:
        s, _ = self._live(i)
        if park:
            s.park()
        else:
            s.close()
            del self.live[i % len(self.live)]

    # -- history

    @precondition(lambda self: self.live)
    @rule(i=INDEX, name=st.none() | NAMES)
    def commit(self, i: int, name: str | None) -> None:
        s, tokens = self._live(i)
        branch = name or s.branch
        parent = s.parent if s.parent in self.commits else None
        tip = self.branches.get(branch) if branch else None
        try:
            done = s.commit("step", branch=name)
        except CommitConflict as conflict:
            assert tip is not None and tip != s.parent
            self.commits[conflict.commit] = (tokens, (parent,) if parent else ())
            return
        assert branch is None or tip is None or tip == parent
        self._committed(done, tokens, parent)

    @precondition(lambda self: self.live)
    @rule(i=INDEX, name=NAMES)
    def adopt(self, i: int, name: str) -> None:
        s, tokens = self._live(i)
        parent = s.parent if s.parent in self.commits else None
        known = s.committed()
        assert known is None or known.commit in self.commits
        done = s.adopt(name)
        if known is None:
            self._committed(done, tokens, parent)
        self.branches[name] = done.commit

    @precondition(lambda self: self.commits)
    @rule(i=INDEX, name=NAMES)
    def branch(self, i: int, name: str) -> None:
        commit = self._commit(i)
        try:
            self.repo.branch(name, commit)
        except RefConflict:
            assert name in self.branches
        else:
            assert name not in self.branches
            self.branches[name] = commit

    @precondition(lambda self: self.commits)
    @rule(i=INDEX, name=TAGS)
    def tag(self, i: int, name: str) -> None:
        commit = self._commit(i)
        try:
            self.repo.tag(name, commit)
        except RefConflict:
            assert name in self.tags
        else:
            assert name not in self.tags
            self.tags[name] = commit

    @rule(name=NAMES | TAGS)
    def delete(self, name: str) -> None:
        drop, ours = (self.repo.delete_tag, self.tags) if name[0] == "v" else (self.repo.delete_branch, self.branches)
        try:
            drop(name)
        except NotFound:
            assert name not in ours
        else:
            del ours[name]

    @rule(old=NAMES, new=NAMES)
    def rename(self, old: str, new: str) -> None:
        try:
            self.repo.rename(old, new)
        except NotFound:
            assert old not in self.branches
        except RefConflict:
            assert new in self.branches
        else:
            self.branches[new] = self.branches.pop(old)

    @rule(everything=st.booleans())
    def collect(self, everything: bool) -> None:
        if not everything:
            self.repo.gc()
            return
        self.repo.gc(keep_reflog_s=0)
        keep: set[str] = set()
        waiting = [*self.branches.values(), *self.tags.values()]
        while waiting:
            commit = waiting.pop()
            if commit not in keep:
                keep.add(commit)
                waiting += self.commits[commit][1]
        self.commits = {i: c for i, c in self.commits.items() if i in keep}

    @rule()
    def reopen(self) -> None:
        """Close and open the repository; the engine and its live sessions stay, bound to the closed one, so they go."""
        for s, _ in self.live:
            s.close()
        self.live.clear()
        self.repo.close()
        self.repo = thaw.open(self.folder / "r", engine=self.engine)

    # -- what must hold

    @invariant()
    def refs_and_commits_are_the_models(self) -> None:
        assert {r.name: r.target for r in self.repo.branches()} == self.branches
        assert {r.name: r.target for r in self.repo.tags()} == self.tags
        assert set(self.repo.store.commits()) == set(self.commits)

    @invariant()
    def live_sessions_hold_their_tokens(self) -> None:
        for s, tokens in self.live:
            assert s.tokens == tokens

    @precondition(lambda self: self.commits)
    @rule(i=INDEX, j=INDEX)
    def look(self, i: int, j: int) -> None:
        """show, log, diff and match say what the model says."""
        a, b = self._commit(i), self._commit(j)
        mine, other = self.commits[a][0], self.commits[b][0]
        shown = self.repo.show(a)
        assert shown.tokens == mine and shown.entry.parents == self.commits[a][1]
        d = self.repo.diff(a, b)
        assert d.num_common_tokens == common_prefix(mine, other)
        assert a != b or d.a.nbytes_own == d.b.nbytes_own == 0
        found, state = self.repo.match(mine), self.repo.store.get_as(self.repo.resolve(a).state, State)
        assert found is not None and state.num_kv <= found.num_tokens <= len(mine)

    @precondition(lambda self: self.commits)
    @rule(i=INDEX, at=INDEX)
    def go_on(self, i: int, at: int) -> None:
        """Greedy tokens after a hydrated point equal those after a prefill of the same tokens."""
        commit = self._commit(i)
        tokens = self.commits[commit][0]
        k = 1 + at % len(tokens)
        greedy = Sampling(temperature=0.0, max_tokens=4, ignore_eos=True)
        with self.repo.session(f"{commit}:{k}") as ours, self.repo.session() as theirs:
            theirs.append(token_ids=tokens[:k])
            a, b = ours.generate("", greedy), theirs.generate("", greedy)
            assert (a.token_ids, a.logprobs) == (b.token_ids, b.logprobs)

    def teardown(self) -> None:
        if hasattr(self, "repo"):
            self.repo.close()
            self.engine.close()
            shutil.rmtree(self.folder)

    # -- helpers

    def _live(self, i: int) -> tuple[Session, tuple[int, ...]]:
        return self.live[i % len(self.live)]

    def _now(self, i: int, tokens: tuple[int, ...]) -> None:
        self.live[i % len(self.live)] = (self.live[i % len(self.live)][0], tokens)

    def _commit(self, i: int) -> str:
        return list(self.commits)[i % len(self.commits)]

    def _committed(self, done: CommitResult, tokens: tuple[int, ...], parent: str | None) -> None:
        self.commits[done.commit] = (tokens, (parent,) if parent else ())
        if done.branch:
            self.branches[done.branch] = done.commit


@pytest.mark.longer_in_soak(
    "400 histories of 60 steps, in place of 15 of 25", receipt="histories",
    covers=("src/thaw/repo", "src/thaw/store", "src/thaw/data", "src/thaw/core", "src/thaw/engines/fake"),
)  # fmt: skip
class TestHistory(History.TestCase):  # type: ignore[misc]
    settings = settings(
        max_examples=400 if SOAK else 15,
        stateful_step_count=60 if SOAK else 25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
