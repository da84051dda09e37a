"""Points on models with windows: at tokens that were asked for ahead the windows are kept that going on there needs,
and, of recurrent layers, the state. What is named as such goes on with the bits of an engine that keeps all windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import thaw
from kind_models import BOTH, WINDOW
from thaw import Sampling
from thaw.core.cache import SlidingKV, token_groups
from thaw.core.errors import NotKept
from thaw.engines.base import Engine
from thaw.engines.embedded.pages import PagedKV, there_until
from thaw.repo import Repository
from thaw.testing.laws.kit import Lab, greedy, ids, same
from thaw.testing.plans import mount_at

GREEDY = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True)
READ, POINTS = 900, (300, 640)


@pytest.fixture
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("gpt_oss")


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with thaw.load_engine("transformers", model=str(folder)) as running:
        yield running


def read(repo: Repository) -> None:
    with repo.session(seed=1) as s:
        s.append(token_ids=ids(READ), points=POINTS)
        s.commit("read", branch="main")


def test_every_token_that_is_named_goes_on_as_where_all_windows_are_kept(repo: Repository, folder: Path) -> None:
    """The tokens that were asked for, the end, and what the blobs hold besides; each from disk."""
    read(repo)
    named = repo.show("main").resumable or ()
    assert {*POINTS, READ} <= set(named) and not {*range(2, 250), 600, 800} & set(named)
    with thaw.load_engine("transformers", model=str(folder), interior=True) as whole:
        all_kept = whole.open(seed=1)
        whole.append(all_kept, ids(READ)).result()
        for token in (named[0], *POINTS, *named[:: len(named) // 12], READ):
            child = whole.fork(all_kept, 1, at=token, replay=True).result()[0]
            with repo.session(f"main:token={token}") as s:
                out = s.generate("", GREEDY)
                expected = Lab(mount_at(folder)).one(whole, child, greedy(6))
                same(out, expected)
                assert out.usage.num_prefilled_tokens <= 1


def test_a_live_session_forks_where_it_was_asked_to_and_nowhere_else(repo: Repository) -> None:
    with repo.session(seed=1) as s:
        s.append(token_ids=ids(READ), points=POINTS)
        live = s.fork(1, at=300)[0].generate("", GREEDY)
        with pytest.raises(
            NotKept, match=r"after 599 tokens the group sliding needs tokens 560 to 598; this session has"
        ):
            s.fork(1, at=600)
        with pytest.raises(NotKept, match="after 700 tokens the group sliding"):
            repo.engine.keep_points(s.ref, [700])
        s.commit("read", branch="main")
    with repo.session("main:token=300") as again:
        assert again.generate("", GREEDY).logprobs == live.logprobs


def test_match_ends_where_a_session_can_go_on(repo: Repository) -> None:
    """In the middle of the text at what is kept, before the first point nowhere."""
    read(repo)
    named = set(repo.show("main").resumable or ())
    for count in (400, 650, 700, READ):
        found = repo.match(ids(count))
        assert found is not None and found.num_tokens in named and found.num_tokens <= count
        assert not {token for token in named if found.num_tokens < token <= count}
        with repo.session(f"main:token={found.num_tokens}") as s:
            assert s.generate("", GREEDY).usage.num_prefilled_tokens <= 1
    assert repo.match(ids(200)) is None


def test_a_point_takes_the_windows_share_and_no_more(repo: Repository) -> None:
    with repo.session(seed=1) as s:
        s.append(token_ids=ids(READ, 7))
        s.commit("plain")
    plain = repo.stats().kv_nbytes
    read(repo)
    window = sum(g.token_nbytes for g in token_groups(repo.engine.info.groups) if isinstance(g, SlidingKV))
    more = repo.stats().kv_nbytes - 2 * plain
    assert 0 < more <= 1.03 * len(POINTS) * (WINDOW + 255) * window


def test_a_session_that_was_brought_back_has_the_windows_that_were_read_and_no_others(repo: Repository) -> None:
    """A parked one too: continuing from tokens that its pages do not have is refused, and computes nothing."""
    read(repo)
    with repo.session("main") as s:
        for _ in range(2):
            with pytest.raises(NotKept, match="after 299 tokens the group sliding needs tokens 260 to 298"):
                s.fork(1, at=300)
            repo.engine.park(s.ref).result()
        s.append(token_ids=ids(5))
        s.commit("on", branch="on")
    assert set(POINTS) <= set(repo.show("on").resumable or ()), "the repository still has them"
    first = (repo.show("main").resumable or ())[0]
    with repo.session(f"main:token={first}") as s:
        for _ in range(2):
            with pytest.raises(NotKept, match="the group sliding needs"):
                s.fork(1, at=first - 1)
            repo.engine.park(s.ref).result()


def test_tokens_that_are_not_there_are_never_stored_between_those_that_are(engine: Engine) -> None:
    group = next(g for g in token_groups(engine.info.groups) if isinstance(g, SlidingKV))
    kv = PagedKV(engine._backend)  # type: ignore[attr-defined]
    kv.num_tokens, kv.asked = 250, {128}
    assert kv.kept(group) == [range(88, 128), range(210, 250)] and kv.first_stored(group, 0, 250) == 88
    assert kv.first_stored(group, 128, 200) == 200
    kv.there = there_until({group.name: (range(88, 128), range(205, 240))}, 240)
    assert kv.kept(group) == [range(88, 128), range(210, 250)] and kv.first_stored(group, 0, 250) == 210
    kv.there = there_until({group.name: (range(88, 128), range(220, 240))}, 230)
    assert kv.kept(group) == [range(88, 128), range(220, 250)] and kv.first_stored(group, 0, 250) == 220


@pytest.mark.parametrize("arch", BOTH)
def test_windows_and_states_are_kept_at_points_turns_and_commits(
    arch: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with (
        thaw.load_engine("transformers", model=str(tiny_model(arch))) as engine,
        thaw.open(tmp_path / "repo", engine=engine) as repo,
    ):
        with repo.session(seed=1) as s:
            s.append(token_ids=ids(READ), points=POINTS)
            first = s.generate("", GREEDY)
            s.generate(token_ids=ids(40, 3), sampling=GREEDY)
            s.commit("talked", branch="main")
            with pytest.raises(NotKept, match="no state is kept after 499 tokens"):
                s.fork(1, at=500)
        shown = repo.show("main")
        assert shown.entry.points == (*POINTS, READ - 1, READ + 5, READ + 45, READ + 51) and shown.entry.state_nbytes
        assert shown.resumable == (*(p + 1 for p in POINTS), READ, READ + 6, READ + 46, READ + 52)
        with repo.session(f"main:token={READ}") as s:
            assert s.generate("", GREEDY).logprobs == first.logprobs
        for point in POINTS:
            with repo.session(f"main:token={point}") as s:
                s.append(token_ids=ids(READ)[point:], points=[p for p in POINTS if p > point])
                assert s.generate("", GREEDY).logprobs == first.logprobs
        found = repo.match(ids(700))
        assert found is not None and found.num_tokens == 641
