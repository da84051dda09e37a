"""What a repository of each kind of model grows by: of a window its share, of a recurrent model's forks no more states
than were asked for. Counted by the bytes of KV and states in the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import thaw
from kind_models import KINDS, RECURRENT
from thaw import Sampling
from thaw.core.cache import CacheGroup, SlidingKV, point_groups, token_groups, token_nbytes
from thaw.engines.base import Engine
from thaw.repo import Repository
from thaw.testing.laws.kit import ids

WINDOWED = [kind for kind, what in KINDS.items() if "windows" in what or "chunks" in what]
QUICK = {"gemma3_text", "qwen3_next"}
GREEDY = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True)
CHILDREN, TOKENS = 12, 1200


def some(kinds: Sequence[str]) -> list[Any]:
    more = pytest.mark.slow("the same on one more model of the kind")
    return [pytest.param(kind, marks=() if kind in QUICK else more) for kind in kinds]


@pytest.fixture
def engine(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    with thaw.load_engine("transformers", model=str(tiny_model(request.param))) as running:
        yield running


def shares(groups: Sequence[CacheGroup], count: int) -> float:
    """Bytes of the full groups' tokens, and of a window those of window + 255 tokens."""
    return sum(
        group.token_nbytes * count * (min(1, (group.window + 255) / count) if isinstance(group, SlidingKV) else 1)
        for group in token_groups(groups)
    )


@pytest.mark.parametrize("engine", some(WINDOWED), indirect=True)
def test_a_session_with_windows_takes_its_groups_shares(repo: Repository) -> None:
    """And a control: with the windows of all tokens it takes far more."""
    groups = repo.engine.info.groups
    with repo.session(seed=1) as s:
        s.append(token_ids=ids(TOKENS))
        s.commit("read", branch="main")
    taken = repo.stats().kv_nbytes
    full = sum(group.token_nbytes for group in token_groups(groups) if not isinstance(group, SlidingKV)) * TOKENS
    assert full < taken <= 1.03 * shares(groups, TOKENS)
    assert token_nbytes(groups) * TOKENS > 1.03 * shares(groups, TOKENS)


@pytest.mark.parametrize("engine", some(WINDOWED), indirect=True)
def test_twelve_forks_share_all_but_their_own_tokens_and_windows(repo: Repository) -> None:
    groups = repo.engine.info.groups
    with repo.session(seed=1) as s:
        s.append(token_ids=ids(TOKENS))
        s.commit("read", branch="main")
    one = repo.stats().kv_nbytes
    with repo.fork("main", CHILDREN) as kids:
        kids.commit("same")
        assert repo.stats().kv_nbytes <= 1.01 * one
        kids.generate([""] * CHILDREN, GREEDY)
        kids.commit("on")
    assert repo.stats().kv_nbytes <= 1.01 * one + CHILDREN * 6 * token_nbytes(groups)


@pytest.mark.parametrize("engine", some([*RECURRENT]), indirect=True)
def test_twelve_forks_of_a_recurrent_model_take_one_session_and_the_states_that_were_asked_for(
    repo: Repository,
) -> None:
    """Two are asked for of the parent; a child that goes on has one of its own, at its end."""
    groups = repo.engine.info.groups
    state = sum(group.nbytes for group in point_groups(groups))
    with repo.session(seed=1) as s:
        s.append(token_ids=ids(TOKENS))
        s.commit("plain")
    plain = repo.stats().kv_nbytes
    with repo.session(seed=1) as s:
        s.append(token_ids=ids(TOKENS, 7), points=[512, 1024])
        s.commit("asked", branch="main")
    one = repo.stats().kv_nbytes - plain
    assert one == plain + 2 * state
    with repo.fork("main", CHILDREN) as kids:
        kids.commit("same")
        assert repo.stats().kv_nbytes == plain + one
        kids.generate([""] * CHILDREN, GREEDY)
        kids.commit("on")
    own = CHILDREN * (5 * token_nbytes(groups) + state)
    assert repo.stats().kv_nbytes <= plain + 1.01 * one + own
