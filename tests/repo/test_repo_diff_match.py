"""Laws of diff and match: tokens decide, bytes are counted once, and no longer prefix is stored than the one found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import thaw
from thaw import Sampling
from thaw.core.prefix import common_prefix
from thaw.repo import Repository


def test_diff_shows_where_two_children_part(repo: Repository) -> None:
    s = repo.session()
    s.append("The same document. " * 40)
    s.commit("read", branch="main")
    with s.fork(2) as kids:
        outs = kids.generate(["Why not? ", "Why yes? "], Sampling(max_tokens=10, ignore_eos=True, logprobs=3))
        kids.commit("k")
        d = repo.diff("k/0", "k/1")
        common = s.num_tokens + len("Why ")
        assert d.num_common_tokens == common and d.same_model and not d.equal
        assert d.a.text == "not? " + outs[0].text and d.b.text == "yes? " + outs[1].text
        assert (d.a.token, d.b.token) == (ord("n"), ord("y")) and d.common_text_end.endswith("Why ")
        assert d.nbytes_shared == s.num_kv * 32 and d.a.nbytes == d.nbytes_shared + d.a.nbytes_own
        assert d.a.logprob is None and d.a.turn == 1


def test_diff_gives_the_logprobs_where_sampled_tokens_part(repo: Repository) -> None:
    s = repo.session(seed=4)
    s.append("Pivot.")
    s.generate("", Sampling(max_tokens=30, ignore_eos=True, logprobs=4))
    s.commit("parent", branch="main")
    kid = repo.fork("main:20", 1)[0]
    kid.resume()
    kid.commit("child", branch="child")
    d = repo.diff("main", "child")
    at = d.num_common_tokens
    assert 20 <= at < 36 and s.turns[1].logprobs is not None and s.turns[1].top_logprobs is not None
    assert d.a.logprob == s.turns[1].logprobs[at - 6] and d.a.top_logprobs == s.turns[1].top_logprobs[at - 6]
    assert d.b.logprob == kid.turns[1].logprobs[at - 6]  # type: ignore[index]


def test_a_point_equals_itself_and_contains_its_prefixes(repo: Repository) -> None:
    s = repo.session()
    s.append("abc" * 200)
    s.commit(branch="main")
    assert repo.diff("main", "main").equal
    d = repo.diff("main:100", "main")
    assert d.num_common_tokens == 100 and d.a.num_own_tokens == 0 and d.a.token is None and d.a.nbytes_own == 0


def test_match_finds_the_longest_stored_prefix_also_inside_a_segment(repo: Repository) -> None:
    s = repo.session()
    s.append("m" * 700)
    s.commit(branch="main")
    kid = s.fork(1)[0]
    kid.append("n" * 300)
    kid.commit(branch="kid")
    tokens = kid.tokens
    for n in (1, 255, 256, 257, 700, 701, 768, 1000):
        found = repo.match([*tokens[:n], 0, 0, 0])
        assert found is not None and found.num_tokens == n, n
        assert repo.session(found).tokens == tokens[:n]
    assert repo.match([0, 1, 2]) is None and repo.match([]) is None
    with thaw.open(repo.path) as reader:  # no engine: the models that refs belong to
        found = reader.match(tokens)
        assert found is not None and found.num_tokens == 1000


def test_match_does_not_name_what_was_deleted(repo: Repository) -> None:
    s = repo.session()
    s.append("gone " * 100)
    s.commit(branch="main")
    tokens = s.tokens
    assert repo.match(tokens) is not None
    repo.delete_branch("main")
    repo.gc(keep_reflog_s=0)
    assert repo.match(tokens) is None


@pytest.mark.slow("compares with a search of everything")
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_match_equals_a_search_of_everything(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path: Path = tmp_path_factory.mktemp("match") / "r"
    piece = st.tuples(st.integers(97, 99), st.integers(1, 300))
    with thaw.load_engine("fake") as engine, thaw.open(path, engine=engine) as repo:
        stored: list[tuple[int, ...]] = []
        for i in range(data.draw(st.integers(1, 4))):
            base = data.draw(st.sampled_from([(), *stored]))
            cut = data.draw(st.integers(0, len(base)))
            s = repo.session() if not cut else repo.session(repo.match(base[:cut]))
            for token, n in data.draw(st.lists(piece, min_size=1, max_size=3)):
                s.append(token_ids=[token] * n)
            s.commit(branch=f"b{i}")
            stored.append(s.tokens)
        query = list(data.draw(st.sampled_from(stored)))
        query = query[: data.draw(st.integers(0, len(query)))] + [
            t for t, n in data.draw(st.lists(piece)) for _ in range(n)
        ]
        best = max(common_prefix(tuple(query), s) for s in stored)
        found = repo.match(query)
        assert (0 if found is None else found.num_tokens) == best


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix_is_common_and_longest(a: Sequence[int], b: Sequence[int]) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])
