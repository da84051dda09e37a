"""Laws of points and refs: every spelling names what git's would, and errors say what exists."""

from __future__ import annotations

from collections import Counter

import pytest

from thaw import Sampling
from thaw.core.canonical import U64
from thaw.core.errors import BadPoint, InvalidRequest, NotFound, RefConflict
from thaw.core.objects import Commit
from thaw.repo import CommitResult, Repository, Session


@pytest.fixture
def history(repo: Repository) -> tuple[Session, list[CommitResult]]:
    """Three commits on main: two turns, four, six."""
    s = repo.session(seed=1)
    done = []
    for i in range(3):
        s.generate(f"Question {i}? ", Sampling(max_tokens=10, ignore_eos=True))
        done.append(s.commit(f"turn {i}", branch="main"))
    return s, done


def test_spellings_name_commits_as_in_git(repo: Repository, history: tuple[Session, list[CommitResult]]) -> None:
    _, done = history
    ids = [d.commit for d in done]
    for text, want in [
        ("main", 2), ("HEAD", 2), ("main~1", 1), ("main~", 1), ("main~2", 0), ("main@{1}", 1), ("main@{2}~0", 0),
        (ids[1], 1), (ids[1][3:11], 1), ("main@{1}~1", 0),
    ]:  # fmt: skip
        assert repo.resolve(text).commit == ids[want], text
    assert repo.resolve("main").branch == "main" and repo.resolve("HEAD").branch == "main"
    assert repo.resolve("main~1").branch is None and repo.resolve("main:3").branch is None
    assert repo.resolve("main").at_end and str(repo.resolve("main")) == ids[2][3:19]


def test_turns_and_tokens_name_places_inside(repo: Repository, history: tuple[Session, list[CommitResult]]) -> None:
    s, done = history
    ends = [0, *(turn.end for turn in s.turns)]
    for n, end in enumerate(ends):
        point = repo.resolve(f"main:turn={n}")
        assert (point.num_tokens, point.turn) == (end, n) == (repo.at("main", turn=n).num_tokens, n)
    inside = repo.resolve("main:token=25")
    assert inside == repo.resolve("main:25") == repo.at("main", token=25)
    assert not inside.at_end and repo.resolve(str(inside)) == inside and inside.turn == 2
    assert repo.resolve("main~1:turn=4").at_end and repo.resolve("main~1:turn=4").commit == done[1].commit


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("nope", NotFound, "there are: main"),
        ("main~9", NotFound, "goes back 2 commits"),
        ("main@{7}", NotFound, "moved 2 times"),
        ("main:turn=9", NotFound, "6 turns"),
        ("main:token=999999", NotFound, "tokens"),
        ("main~x", BadPoint, "is not a point"),
        ("b3:00", NotFound, "no branch"),
    ],
)
def test_what_is_not_there_is_named(
    repo: Repository, history: tuple[Session, list[CommitResult]], text: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        repo.resolve(text)


def test_an_ambiguous_id_lists_what_it_could_be(repo: Repository) -> None:
    s = repo.session()
    s.append("x")
    state = s.commit().state
    with repo.store.begin() as tx:
        made = [tx.put(Commit(state=state, parents=(), message=str(i), time_ns=U64(i)))[3:7] for i in range(1500)]
        tx.commit()
    digits = next(d for d, n in Counter(made).items() if n > 1)
    with pytest.raises(BadPoint, match=f"{digits}.*write more digits"):
        repo.resolve(digits)


def test_an_empty_repository_says_so(repo: Repository) -> None:
    assert repo.log() == [] and repo.log(all=True) == []
    with pytest.raises(NotFound, match="no commits yet"):
        repo.resolve("main")


def test_branches_and_tags_are_made_renamed_and_deleted(
    repo: Repository, history: tuple[Session, list[CommitResult]]
) -> None:
    _, done = history
    repo.branch("try", "main~1")
    repo.tag("v1", "main~2")
    assert {ref.name for ref in repo.branches()} == {"main", "try"} and [ref.name for ref in repo.tags()] == ["v1"]
    with pytest.raises(RefConflict, match="exists already"):
        repo.branch("try", "main")
    with pytest.raises(InvalidRequest, match="lies inside"):
        repo.tag("inside", "main:5")
    repo.rename("main", "trunk")
    assert repo.store.head == "trunk" and repo.resolve("HEAD").commit == done[2].commit
    assert repo.delete_tag("v1").target == done[0].commit and repo.tags() == []
    with pytest.raises(NotFound, match="no branch 'v1'"):
        repo.delete_branch("v1")
    repo.delete_branch("try")
    assert repo.resolve("try@{1}").commit == done[1].commit


def test_names_with_a_meaning_are_reserved(repo: Repository) -> None:
    s = repo.session()
    s.append("x")
    loose = [s.commit("one").commit, s.commit("two").commit]
    assert repo.resolve("detached@{1}").commit == loose[1] and repo.resolve("detached@{2}").commit == loose[0]
    for name in ("HEAD", "detached"):
        with pytest.raises(InvalidRequest, match="choose another name"):
            repo.branch(name, loose[0])
        with pytest.raises(InvalidRequest, match="choose another name"):
            s.commit(branch=name)
    with pytest.raises(InvalidRequest, match="seed=-1"):
        repo.session(seed=-1)


def test_adopting_moves_the_branch_and_keeps_the_old_tip_in_the_reflog(repo: Repository) -> None:
    s = repo.session()
    s.append("the question")
    base = s.commit("asked", branch="main")
    kids = s.fork(3)
    kids.generate("", Sampling(max_tokens=12, ignore_eos=True))
    won = kids[1].adopt("main")
    assert repo.resolve("main").commit == won.commit and repo.resolve("main@{1}").commit == base.commit
    assert repo.show("main").tokens == kids[1].tokens and repo.log("main")[0].parents == (base.commit,)
    assert repo.adopt(kids[1], "main").target == won.commit  # nothing new: no new commit
    kids[2].commit(branch="other")
    repo.adopt("other", "main")
    assert repo.resolve("main").commit == repo.resolve("other").commit
    assert repo.resolve("main@{1}").commit == won.commit
    with pytest.raises(InvalidRequest, match="lies inside"):
        repo.adopt("main:3", "main")


def test_log_is_newest_first_with_children_before_parents(repo: Repository) -> None:
    s = repo.session()
    s.append("root")
    s.commit("root", branch="main")
    kids = s.fork(2)
    for i, kid in enumerate(kids):
        for j in range(2):
            kid.append(f"{i}.{j}")
            kid.commit(f"{i}.{j}", branch=f"k/{i}")
    entries = repo.log(all=True)
    order = [e.commit for e in entries]
    assert len(order) == 5 and entries[-1].message == "root"
    for entry in entries:
        assert all(order.index(parent) > order.index(entry.commit) for parent in entry.parents)
    assert [e.message for e in repo.log("k/0")] == ["0.1", "0.0", "root"]
    assert [e.message for e in repo.log(all=True, limit=2)] == ["1.1", "1.0"]


def test_show_tells_turns_text_model_and_bytes(repo: Repository, history: tuple[Session, list[CommitResult]]) -> None:
    s, _ = history
    shown = repo.show("main")
    assert shown.tokens == s.tokens and shown.turns == s.turns and shown.text == s.text
    assert shown.model == repo.engine.identity() and shown.nbytes == (len(s.tokens) - 1) * 32 and not shown.unfinished
    inside = repo.show("main:token=20")
    assert inside.num_kv == 19 and inside.unfinished and inside.turns[-1].finish_reason is None
    assert inside.turns[-1].end == 20
