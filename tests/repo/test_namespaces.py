"""Laws of namespaces: a tenant reaches, matches and infers nothing of another, and nothing of a tenant is lost.

`acme` has what others want: a branch, a tag, a commit on no branch. `bolt` tries to get at it, and so does the default
namespace; each try is done in `acme`, too, where it must succeed: else nothing was tried.
"""

from __future__ import annotations

import random
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import thaw
from thaw import Sampling
from thaw.core import namespaces
from thaw.core.errors import BadPoint, InvalidRequest, NewerFormat, NotFound, ThawError
from thaw.core.namespaces import qualify, split
from thaw.core.objects import Commit, NamespacedCommit
from thaw.core.points import Point
from thaw.engines.base import Engine
from thaw.repo import CommitResult, Repository, ResolvedPoint
from thaw.store import RefUpdate, Store, backup, db, fsck, settings, store

TEXT = "The plans of acme, which are nobody else's. " * 20
HOSTILE = [
    "@acme/main", "acme/main", "acme:main", "@acme", "@/main", "@acme/../acme/main", "%40acme/main", "@acme/main~0",
    "../acme/main", "main@{acme}", "\uff20acme/main", "@acme/main\n", "@acme/main\0", "' OR 1=1 --", "b3:", "%", "_",
]  # fmt: skip


def told(repo: Repository, text: str = TEXT, *, branch: str | None = "main") -> CommitResult:
    s = repo.session(seed=1)
    s.append(text)
    return s.commit("told", branch=branch)


@pytest.fixture
def acme(repo: Repository) -> Repository:
    there = repo.within("acme")
    first = told(there)
    there.tag("v1", first.commit)
    s = there.session("main")
    s.generate("More? ", Sampling(max_tokens=9, ignore_eos=True))
    s.commit("more", branch="main")
    told(there, "A commit on no branch. " * 15, branch=None)
    return there


@pytest.fixture(params=["bolt", ""])
def other(repo: Repository, acme: Repository, request: pytest.FixtureRequest) -> Repository:
    """Somebody else, with a history of their own."""
    there = repo.within(request.param) if request.param else repo
    told(there, "Something of their own. " * 20)
    return there


def spellings(acme: Repository) -> Iterator[Any]:
    """Every way to say where something of acme's is."""
    commits = list(acme.store.commits())
    assert len(commits) == 3
    for commit in commits:
        digits = commit.removeprefix("b3:")
        yield from (digits[:n] for n in (4, 5, 8, 16, 40, 63, 64))
        yield commit
        yield f"{digits}~0:token=3"
        yield acme.resolve(commit)
        yield Point(name=digits)
    for name in ("main", "v1"):
        yield acme.resolve(name)
        yield msgspec.structs.replace(acme.resolve(name), branch=None, num_tokens=5, at_end=False)


def refused(do: Callable[[], object]) -> str:
    with pytest.raises((NotFound, BadPoint, InvalidRequest)) as caught:
        do()
    return str(caught.value)


def test_nothing_of_another_is_reached_by_whatever_name_or_id(acme: Repository, other: Repository) -> None:
    before = (acme.branches(), acme.tags(), acme.log(all=True), acme.reflog("main"))
    for point in spellings(acme):
        assert acme.resolve(point)
        for do in (
            other.resolve, other.show, other.session, lambda p: other.fork(p, 2), other.log,
            lambda p: other.diff("main", p), lambda p: other.branch("mine", p), lambda p: other.tag("mine", p),
            lambda p: other.adopt(p, "main"), lambda p: other.at(p, token=1),
            lambda p: other.verify(p, fresh_process=False),
        ):  # fmt: skip
            said = refused(lambda: do(point))  # noqa: B023 - called at once
            assert "acme" not in said.replace(repr(point), "") and "v1" not in said
    for point in HOSTILE:
        for use in (other.resolve, other.session, lambda p: other.branch("mine", p), other.reflog, other.delete_branch):
            refused(lambda: use(point))  # noqa: B023
    for name in ("@acme/main", "@acme/x", "@bolt/x", "@/x"):
        for make in (
            other.branch, other.tag, other.delete_tag, other.undo, lambda n: other.rename("main", n),
            lambda n: other.session("main").commit(branch=n), lambda n: other.adopt("main", n), other.store.set_head,
            lambda n: other.store.update_refs(RefUpdate(n, "branch", other.resolve("main").commit, "any", "")),
        ):  # fmt: skip
            refused(lambda: make(name))  # noqa: B023
    for name in ("v1", "detached"):
        refused(lambda: other.delete_tag(name))  # noqa: B023
    assert (acme.branches(), acme.tags(), acme.log(all=True), acme.reflog("main")) == before


def test_an_id_of_another_is_refused_in_the_words_of_one_that_is_not_there(acme: Repository, other: Repository) -> None:
    theirs = acme.resolve("main")
    absent = msgspec.structs.replace(theirs, commit="b3:" + "0123456789abcdef" * 4)
    for ask in (lambda p: other.resolve(p.commit), other.resolve, lambda p: other.branch("x", p)):
        said = [refused(lambda: ask(p)).replace(p.commit[3:], "ID") for p in (theirs, absent)]  # noqa: B023
        assert said[0] == said[1]
    assert other.store.has(theirs.commit) is False and acme.store.has(theirs.commit)
    assert other.store.recorders(theirs.state) == [] and acme.store.recorders(theirs.state) == [theirs.commit]
    update = RefUpdate("x", "branch", theirs.commit, None, "")
    assert "there is no commit" in refused(lambda: other.store.update_refs(update))


def test_a_point_is_not_put_together_of_ones_own_commit_and_anothers_state(acme: Repository, other: Repository) -> None:
    mine, theirs = other.resolve("main"), acme.resolve("main")
    forged = msgspec.structs.replace(theirs, commit=mine.commit)
    for use in (other.session, lambda p: other.fork(p, 1), other.show, lambda p: other.verify(p, fresh_process=False)):
        refused(lambda: use(forged))  # noqa: B023
    assert other.session(mine).num_tokens == mine.num_tokens


def test_thousands_of_guesses_find_nothing(acme: Repository, other: Repository) -> None:
    own, dice, found = set(other.store.commits()), random.Random(5), 0
    ids = [commit.removeprefix("b3:") for commit in acme.store.commits()]
    for _ in range(3000):
        if dice.random() < 0.5:
            at = dice.randrange(4, 65)
            guess = dice.choice(ids)[:at]  # as if a part of it had been seen in a log
            found += bool(acme.store.find(guess))
        else:
            guess = f"{dice.getrandbits(64):016x}"[: dice.randrange(4, 17)]
        assert set(other.store.find(guess)) <= own
    assert found > 1000


def test_match_finds_ones_own_prefixes_alone(repo: Repository, acme: Repository, other: Repository) -> None:
    session = acme.session("main")
    tokens = session.tokens
    assert (found := acme.match(tokens)) is not None and found.num_tokens == len(tokens)
    assert other.match(tokens) is None
    shorter = TEXT[:300]
    told(other, shorter, branch="short")
    mine = other.match(tokens)  # acme's is longer, and nearer to what is asked for
    assert mine is not None and mine.num_tokens == 300 and mine.commit == other.resolve("short").commit
    with thaw.open(repo.path, namespace=other.namespace or None) as without_engine:
        again = without_engine.match(tokens)
        assert again is not None and again.commit == mine.commit


def statements(repo: Repository, monkeypatch: pytest.MonkeyPatch, do: Callable[[Repository], object]) -> list[str]:
    """What SQLite was asked, values left out."""
    asked: list[str] = []
    plain = db.connect

    def traced(path: Path) -> sqlite3.Connection:
        connection = plain(path)
        connection.set_trace_callback(asked.append)
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(db, "connect", traced)
        with thaw.open(repo.path, engine=repo.engine, namespace=repo.namespace or None) as fresh:
            asked.clear()
            do(fresh)
    return [re.sub(r"x?'[^']*'|\b\d+\b", "?", line) for line in asked]


def test_what_others_have_stored_costs_match_nothing(
    acme: Repository, other: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = acme.session("main").tokens
    nobodys = tuple(random.Random(1).choices(range(97, 122), k=len(theirs)))
    asked = [statements(other, monkeypatch, lambda r: r.match(tokens)) for tokens in (theirs, nobodys)]  # noqa: B023
    assert asked[0] == asked[1] and asked[0]
    assert statements(acme, monkeypatch, lambda r: r.match(theirs)) != asked[0]


def written(repo: Repository, text: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[int]]:
    """What a commit of `text` asks of SQLite, and the sizes of the packs that it leaves."""
    before = {path.name for path in (repo.path / "packs").iterdir()}

    def commit(fresh: Repository) -> None:
        session = fresh.session(seed=1)
        session.append(text)
        session.commit("told", branch=f"b{len(before)}")

    asked = statements(repo, monkeypatch, commit)
    return asked, sorted(p.stat().st_size for p in (repo.path / "packs").iterdir() if p.name not in before)


def test_what_others_have_stored_shows_in_no_commit(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    acme, bolt, new, old = repo.within("acme"), repo.within("bolt"), TEXT, TEXT[::-1]
    told(acme, old)
    told(bolt, "The model was used before. ")
    written(bolt, TEXT.upper(), monkeypatch)  # it ends the log of refs that an open store has, whatever it writes
    assert written(bolt, old, monkeypatch) == written(bolt, new, monkeypatch)
    told(repo, old)
    without = [written(repo, text, monkeypatch)[1] for text in (old, TEXT.swapcase())]
    assert len(without[0]) < len(without[1])  # the default namespace stores equal bytes once, and that can be seen
    assert repo.fsck().problems == []
    repo.gc(keep_reflog_s=0.0)
    assert repo.fsck().problems == []
    for there in (acme, bolt, repo):
        for ref in there.branches():
            assert there.verify(ref.name, fresh_process=False, num_tokens=0).ok


def test_gc_keeps_what_any_namespace_names_and_takes_what_none_does(repo: Repository, acme: Repository) -> None:
    doomed = told(repo.within("gone"), "Nobody names this for long. " * 9)
    repo.within("gone").delete_branch("main")
    tips = [acme.resolve(name).commit for name in ("main", "v1")]
    report = repo.gc(keep_reflog_s=0.0)
    assert report.commits_removed == 2 and not repo.within("gone").store.has(doomed.commit)
    assert [acme.resolve(name).commit for name in ("main", "v1")] == tips
    assert acme.verify("main", fresh_process=False).ok
    for verb in (acme.gc, acme.fsck, acme.namespaces, lambda: acme.within("bolt")):
        with pytest.raises(InvalidRequest, match="without a namespace"):
            verb()


def test_each_has_its_own_head_branches_reflog_undo_and_stats(repo: Repository, acme: Repository) -> None:
    bolt = repo.within("bolt")
    assert (bolt.branches(), bolt.tags(), bolt.log(), bolt.log(all=True)) == ([], [], [], [])
    told(bolt, "b" * 300)
    told(bolt, "c" * 300, branch="side")
    bolt.store.set_head("side")
    assert (acme.store.head, bolt.store.head, repo.store.head) == ("main", "side", "main")
    assert bolt.resolve("HEAD").commit == bolt.resolve("side").commit
    assert [entry.refs for entry in bolt.log(all=True)] == [("HEAD -> side",), ("main",)]
    assert [ref.name for ref in acme.branches()] == ["main"] and [ref.name for ref in acme.tags()] == ["v1"]
    assert {entry.name for entry in acme.reflog("main")} == {"main"} and len(acme.reflog("main")) == 2
    acme.undo()
    assert acme.resolve("main").commit == acme.resolve("v1").commit
    assert len(bolt.reflog("main")) == 1 and repo.log(all=True) == [] and repo.branches() == []
    assert repo.namespaces() == ["acme", "bolt"]
    assert acme.stats().num_commits == 1 and bolt.stats().num_commits == 2
    assert bolt.stats().kv_nbytes == bolt.stats().whole_nbytes == 2 * 300 * 32


def test_a_fork_commits_where_it_came_from_and_is_adopted_there_alone(acme: Repository, other: Repository) -> None:
    with acme.fork("main", 2) as kids:
        kids.generate("Go. ", Sampling(max_tokens=4, ignore_eos=True))
        kids.commit("kid")
        assert [ref.name for ref in acme.branches()] == ["kid/0", "kid/1", "main"]
        assert {ref.name for ref in other.branches()} == {"main"}
        assert kids[0].commits_to(acme.store) and not kids[0].commits_to(other.store)
        with pytest.raises(InvalidRequest, match="another repository or namespace"):
            other.adopt(kids[0], "main")
        acme.adopt(kids[0], "main")


@pytest.mark.parametrize("lost", [("thaw.db",), ("thaw.db", "refs.json")], ids="+".join)
def test_a_rebuild_gives_each_its_own_again(repo: Repository, acme: Repository, lost: tuple[str, ...]) -> None:
    told(repo, "Of nobody in particular. " * 20)
    told(repo.within("bolt"), "Of bolt. " * 20)
    secret = acme.session(salt="s").view().salt
    tips = {name: there.resolve("main").commit for name, there in views(repo).items()}
    matches = acme.session("main").tokens
    path = repo.path
    repo.close()
    for name in lost:
        (path / name).unlink()
    assert fsck(path, rebuild=True).ok and fsck(path).problems == []
    assert b'"thaw.refs/2"' in (path / "refs.json").read_bytes()
    with thaw.open(path, engine=repo._context._engine) as again:
        assert {name: there.resolve("main").commit for name, there in views(again).items()} == tips
        assert again.within("bolt").match(matches) is None and again.match(matches) is None
        found = again.within("acme").match(matches)
        assert found is not None and found.num_tokens == len(matches)
        if lost == ("thaw.db",):
            assert again.within("acme").session(salt="s").view().salt == secret
        assert again.gc(keep_reflog_s=1e6).commits_removed == 0


def views(repo: Repository) -> dict[str, Repository]:
    return {"": repo, **{name: repo.within(name) for name in ("acme", "bolt")}}


def test_a_repository_without_namespaces_is_what_it_was(repo: Repository) -> None:
    done = told(repo)
    with repo.store.database.read() as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    assert type(repo.store.get(done.commit)) is Commit
    assert b'"thaw.refs/1"' in (repo.path / "refs.json").read_bytes()
    repo.within("acme")  # to look is not to write
    assert repo.within("acme").log() == [] and repo.within("acme").match([1, 2, 3]) is None
    with repo.store.database.read() as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (2,)


@pytest.mark.parametrize("first", [told, lambda r: r.session(salt="x"), lambda r: r.store.set_head("x")])
def test_an_older_thaw_refuses_what_has_namespaces(
    repo: Repository, first: Callable[[Repository], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    first(repo.within("acme"))
    assert fsck(repo.path).problems == []
    monkeypatch.setattr(settings, "SHALLOW", 2)
    for attempt in (Store.open, fsck, lambda path: fsck(path, rebuild=True)):
        with pytest.raises(NewerFormat, match="format 3"):
            attempt(repo.path)
    monkeypatch.setattr(backup, "_DECODER", msgspec.json.Decoder(backup.Backup))
    monkeypatch.setattr(backup, "_KNOWN", backup._KNOWN[:1])
    with pytest.raises(NewerFormat, match="newer thaw"):
        backup.read(repo.path)


def test_a_commit_of_another_is_not_written(acme: Repository, other: Repository) -> None:
    with other.store.begin() as tx, pytest.raises(InvalidRequest, match="namespace"):
        tx.put(acme.store.get(acme.resolve("main").commit))
    commit = acme.store.get(acme.resolve("main").commit)
    assert type(commit) is NamespacedCommit and commit.of_namespace == "acme"


def test_lineage_salts_of_a_namespace_are_nobody_elses(repo: Repository, acme: Repository) -> None:
    bolt = repo.within("bolt")
    salts = {there.session(salt="s").view().salt for there in (acme, bolt, repo)}
    assert len(salts) == 3 and repo.session(salt="s").view().salt == "s"
    mine = acme.session(salt="s").view().salt
    assert acme.session(salt="s").view().salt == mine and bolt.session(salt=mine).view().salt != mine
    shared = [there.session(share_prefix=True).view().salt for there in (acme, acme, bolt)]
    assert shared[0] == shared[1] != shared[2] and "" not in shared
    secret = repo.store.get_setting(store.SECRET)
    assert secret is not None and len(secret) == 32
    with pytest.raises(InvalidRequest, match="half a character"):
        acme.session(salt="\ud800")


def test_verify_in_a_fresh_process_looks_in_the_namespace(acme: Repository) -> None:
    assert acme.verify("main", num_tokens=2).ok


@pytest.mark.parametrize(
    "name",
    ["", "@acme", "a/b", "a..b", ".", "..", "-a", "a b", "a\n", "a\0", "ä", "a" * 101, "a:b", "a'--", "a.lock", "%61",
     "\u0430cme", None, 7, b"acme"],
)  # fmt: skip
def test_what_cannot_name_a_namespace_is_refused(repo: Repository, name: Any) -> None:
    for enter in (repo.within, lambda n: thaw.open(repo.path, namespace=n), repo.store.within, namespaces.check):
        if name is None and enter is not repo.within:
            continue
        with pytest.raises(InvalidRequest, match="cannot name a namespace"):
            enter(name)
    assert repo.namespaces() == []


def test_names_are_told_apart(repo: Repository) -> None:
    names = ["a", "A", "a.b", "a-b", "a_b", "ab", "a0", "b", "0", "_", "HEAD", "main", "a" * 100]
    for number, name in enumerate(names):
        told(repo.within(name), f"This is number {number}. " * 3, branch="b/main")
    for name in names:
        there = repo.within(name)
        assert [ref.name for ref in there.branches()] == ["b/main"] and there.stats().num_commits == 1
        assert split(qualify(name, "b/main")) == (name, "b/main")
    assert repo.namespaces() == sorted(names)
    assert len({repo.within(name).resolve("b/main").commit for name in names}) == len(names)


def test_a_namespace_ends_with_its_repository_and_not_the_other_way(tmp_path: Path, engine: Engine) -> None:
    with thaw.open(tmp_path / "runs", engine=engine) as repo:
        with repo.within("acme") as there:
            told(there)
        assert there.resolve("main") and repo.log() == []
    with pytest.raises(ThawError):
        there.resolve("main")
    with thaw.open(tmp_path / "runs", namespace="acme") as alone:
        assert alone.resolve("main").num_tokens == len(TEXT) and "of acme" in repr(alone)
    with pytest.raises(ThawError):
        alone.resolve("main")


def test_the_resolved_point_of_a_caller_is_looked_at_in_the_default_namespace_as_well(repo: Repository) -> None:
    told(repo)
    point = repo.resolve("main")
    assert repo.resolve(point) is point
    with pytest.raises(NotFound):
        repo.resolve(ResolvedPoint(commit=point.commit, state=point.commit, num_tokens=1, turn=0, at_end=False))  # type: ignore[arg-type]
