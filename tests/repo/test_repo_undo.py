"""Undo goes back move by move and deletes nothing; stats count each byte once."""

from __future__ import annotations

import pytest

from thaw import Sampling
from thaw.core.errors import Conflict, NotFound
from thaw.repo import Repository


def commits(repo: Repository, num: int) -> list[str]:
    s = repo.session()
    made = []
    for i in range(num):
        s.append(f"words {i} " * 10)
        made.append(s.commit(f"c{i}", branch="main").commit)
    return made


def test_each_undo_goes_one_move_further_back(repo: Repository) -> None:
    a, b, c = commits(repo, 3)
    assert repo.undo().new == b and repo.store.ref("main").target == b
    done = repo.undo("main")
    assert (done.old, done.new) == (b, a) and done.reason.startswith("commit: c1")
    repo.adopt(c, "main")
    assert repo.undo("main").new == a, "an undo takes back what came after one, too"
    assert repo.undo("main").new is None and repo.store.ref("main") is None
    with pytest.raises(NotFound, match="no move left"):
        repo.undo("main")
    assert [entry.commit for entry in repo.log(c)] == [c, b, a], "nothing is deleted"


def test_a_deleted_branch_and_a_tag_are_there_again(repo: Repository) -> None:
    (a,) = commits(repo, 1)
    repo.tag("v1")
    repo.delete_tag("v1")
    assert repo.undo("v1").kind == "tag" and repo.store.ref("v1").target == a
    repo.delete_branch("main")
    repo.undo("main")
    assert repo.store.ref("main").target == a
    with pytest.raises(NotFound, match="there are: main, v1"):
        repo.undo("none")


def test_undo_says_when_gc_took_the_commit(repo: Repository) -> None:
    commits(repo, 1)
    other = repo.session()
    other.append("other")
    kept = other.commit(branch="other").commit
    repo.adopt(kept, "main")
    repo.gc(keep_reflog_s=0)
    with pytest.raises(Conflict, match="gc has removed"):
        repo.undo("main")
    assert repo.store.ref("main").target == kept


def test_the_reflog_is_read_no_further_than_asked(repo: Repository) -> None:
    a, b, c = commits(repo, 3)
    assert [entry.new for entry in repo.reflog("main", limit=2)] == [c, b]
    assert [entry.new for entry in repo.reflog("main")] == [c, b, a]
    assert repo.resolve("main@{2}").commit == a


def test_stats_count_shared_bytes_once(repo: Repository) -> None:
    s = repo.session()
    s.append("a document. " * 60)
    first = s.commit(branch="main")
    kids = s.fork(4)
    kids.generate(sampling=Sampling(max_tokens=8, ignore_eos=True))
    for i, kid in enumerate(kids):
        kid.commit(branch=f"kid/{i}")
    found = repo.stats(prefill_tokens_per_s=100.0)
    refs = {ref.name: ref for ref in found.refs}
    per_token = refs["main"].nbytes // (first.num_tokens - 1)
    assert refs["main"].own_nbytes == 0 and refs["kid/0"].own_nbytes > 0
    assert found.num_commits == 5
    assert found.whole_nbytes == sum(ref.nbytes for ref in found.refs)
    assert found.kv_nbytes >= refs["main"].nbytes + sum(ref.own_nbytes for ref in found.refs)
    assert found.dedup > 3 and per_token > 0
    assert found.num_tokens_saved == 3 * first.num_tokens and found.seconds_saved == 3 * first.num_tokens / 100
    assert found.pack_nbytes == sum(path.stat().st_size for path in (repo.path / "packs").iterdir())


def test_stats_of_an_empty_repository(repo: Repository) -> None:
    found = repo.stats()
    assert (found.num_commits, found.dedup, found.refs, found.seconds_saved) == (0, 1.0, (), None)
