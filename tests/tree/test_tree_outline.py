"""The outline: which sessions there are, and what each shares with the one that it forked from."""

from __future__ import annotations

import re
import time
from pathlib import Path

import msgspec
import pytest
from grown import Grower, named_chain

import thaw
from thaw.core.ids import CommitId, short
from thaw.repo import Repository
from thaw.store import RefUpdate
from thaw.tree import parts
from thaw.tree.details import read_point
from thaw.tree.outline import Outline, OutlineHistory, kept_on_no_branch
from thaw.tree.page import FILE_NBYTES, TreeFile

LONG = thaw.Sampling(max_tokens=24, logprobs=2)


def grow(repo: Repository) -> None:
    """main: two commits; four forks of it; two of main~1 on no branch."""
    session = repo.session()
    session.append("a long document about a river. " * 20)
    session.commit("read", branch="main")
    session.generate("What?", LONG)
    session.commit("asked", branch="main")
    with repo.fork("main", 4) as kids:
        kids.generate(["a", "b", "c", "d"], LONG)
        for i, kid in enumerate(kids):
            kid.commit(f"kid {i}", branch=f"kid/{i}")
    with repo.fork("main~1", 2) as kids:
        kids.generate(["e", "f"], LONG)
        for kid in kids:
            kid.commit("on no branch")


def sessions(outline: Outline) -> dict[str, list[str]]:
    """The message of each session's end, and those of the sessions below it."""
    found: dict[str, list[str]] = {}
    waiting = list(outline.roots)
    for first in waiting:
        one = outline.session(first)
        below = [outline.commits[outline.session(child).tip].message for child in one.children]
        found[outline.commits[one.tip].message] = sorted(below)
        waiting += one.children
    return found


def test_a_session_ends_where_it_has_a_name_or_forks(repo: Repository) -> None:
    grow(repo)
    outline = OutlineHistory(repo).outline(kept_on_no_branch(repo))
    assert sessions(outline)["read"] == ["asked", "on no branch", "on no branch"]
    assert sessions(outline)["asked"] == [f"kid {i}" for i in range(4)]
    assert outline.num_sessions == 8


def test_without_forks_a_conversation_is_one_session(repo: Repository) -> None:
    session = repo.session()
    for i in range(6):
        session.append(f"turn {i} ")
        session.commit(f"turn {i}", branch="main")
    outline = OutlineHistory(repo).outline()
    (only,) = outline.roots
    assert len(outline.session(only).commits) == 6
    assert all(outline.first_of(one) == only for one in outline.session(only).commits)


def test_what_is_shared_and_own_is_what_diff_counts(repo: Repository) -> None:
    grow(repo)
    history = OutlineHistory(repo)
    outline = history.outline(kept_on_no_branch(repo))
    for commit in outline.commits.values():
        part = history.own_part(commit.id, commit.parent)
        if commit.parent is None:
            shown = repo.show(short(commit.id, 16))
            assert (part.num_shared, part.num_own, part.nbytes) == (0, commit.num_tokens, shown.nbytes)
            continue
        found = repo.diff(short(commit.id, 16), short(commit.parent, 16))
        assert (part.num_shared, part.num_own) == (found.num_common_tokens, found.a.num_own_tokens)
        assert part.nbytes == found.a.nbytes_own


def test_a_fork_from_inside_shares_only_what_lies_before_it(repo: Repository) -> None:
    grow(repo)
    with repo.session("main:token=100") as session:
        session.append("another way")
        made = session.commit("inside")
    history = OutlineHistory(repo)
    history.outline(kept_on_no_branch(repo))
    assert history.own_part(made.commit, repo.resolve("main").commit).num_shared == 100


def test_what_forking_saved_is_what_stats_counts(repo: Repository) -> None:
    grow(repo)
    assert OutlineHistory(repo).outline().saved.num_tokens == repo.stats().num_tokens_saved > 0


def test_a_namespace_sees_its_own_sessions_alone(repo: Repository) -> None:
    grow(repo)
    acme = repo.within("acme")
    with acme.session() as session:
        session.append("acme's own")
        mine = session.commit("acme", branch="main")
    assert set(OutlineHistory(acme).outline(kept_on_no_branch(acme)).commits) == {mine.commit}
    assert mine.commit not in OutlineHistory(repo).outline(kept_on_no_branch(repo)).commits
    theirs = repo.resolve("main").commit
    assert OutlineHistory(acme).outline([theirs]).commits.keys() == {mine.commit}


def test_what_is_new_is_seen_and_what_is_deleted_is_gone(repo: Repository) -> None:
    grow(repo)
    history = OutlineHistory(repo)
    before = history.outline()
    with repo.session("kid/0") as session:
        session.append("more")
        made = session.commit("more", branch="kid/0")
    after = history.outline()
    assert after.commits.keys() - before.commits.keys() == {made.commit}
    was = repo.resolve("kid/0~1").commit
    repo.delete_branch("kid/0")
    assert history.outline().commits.keys() == before.commits.keys() - {was}


def test_one_point_shows_what_led_to_it_and_what_came_of_it(repo: Repository) -> None:
    grow(repo)
    asked, kid = repo.resolve("main").commit, repo.resolve("kid/1").commit
    history = OutlineHistory(repo)
    assert set(history.outline(only=kid).commits) == {kid, asked, repo.resolve("main~1").commit}
    assert len(history.outline(only=asked).commits) == 6


def test_margins_are_those_that_were_recorded(repo: Repository) -> None:
    grow(repo)
    point = read_point(repo, "kid/0", repo.engine.codec)
    turn = repo.show("kid/0").turns[-1]
    tokens = point.turns[-1].tokens
    assert tokens is not None and turn.logprobs is not None and turn.top_logprobs is not None
    assert "".join(token.text or "" for token in tokens) == turn.text
    for token, logprob, top in zip(tokens, turn.logprobs, turn.top_logprobs, strict=True):
        best_other = max(value for other, value in top if other != token.token)
        assert token.margin == logprob - best_other
        assert (token.colour == -1) == (token.margin < 0)


def test_the_legend_has_every_colour_and_says_how_margins_are_recorded(repo: Repository) -> None:
    for name, logprobs in (("with", 2), ("without", 0)):
        with repo.session() as session:
            session.generate("What?", thaw.Sampling(max_tokens=40, logprobs=logprobs))
            session.commit(name, branch=name)
    codec = repo.engine.codec
    turns = {name: read_point(repo, name, codec).turns for name in ("with", "without")}
    told = {name: str(parts.legend(found)) for name, found in turns.items()}
    swatches = {name: re.findall(r'<i class="(\w+)">', one) for name, one in told.items()}
    assert swatches == {"with": ["x", "m0", "m1", "m2", "m3", "m4"], "without": ["m0", "m1", "m2", "m3", "m4"]}
    assert "--logprobs 2" in told["without"] and "--logprobs" not in told["with"]
    both = str(parts.legend([*turns["with"], *turns["without"]]))
    assert re.findall(r'<i class="(\w+)">', both) == [*swatches["with"], *swatches["without"]]
    title = parts._told(next(token for token in turns["without"][-1].tokens or ()))
    assert title.startswith("log probability -")


def test_a_prompt_of_several_messages_says_so(repo: Repository) -> None:
    with repo.session() as session:
        session.append(messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Go."}])
        session.append(messages=[{"role": "user", "content": "And now?"}])
        session.commit("asked", branch="main")
    first, second = read_point(repo, "main", repo.engine.codec).turns
    assert "prompt of 2 messages: system, user" in parts.turn_part(first, "main", parts.FragmentRoom())
    assert " · user · " in parts.turn_part(second, "main", parts.FragmentRoom())


def test_without_a_tokenizer_tokens_have_numbers_alone(repo: Repository) -> None:
    grow(repo)
    tokens = read_point(repo, "kid/0", None).turns[-1].tokens
    assert tokens is not None and {token.text for token in tokens} == {None}


@pytest.mark.parametrize("shape", ["star", "chain"])
def test_ten_thousand_commits_are_outlined_at_once(grower: Grower, shape: str) -> None:
    with thaw.open(grower.grown(shape)) as repo:
        history = OutlineHistory(repo)
        outline = history.outline()
        assert len(outline.commits) >= 10_000
        begun = time.perf_counter()
        again = history.outline()
        assert again.commits.keys() == outline.commits.keys()
        assert time.perf_counter() - begun < 3
        unfolded = parts.unfold(outline)
        assert 1 <= unfolded.num_rows <= parts.ROWS
        assert sum(outline.session(one).num_below + len(outline.session(one).commits) for one in outline.roots) == len(
            outline.commits
        )


def test_of_all_sessions_each_is_reached_from_a_root(grower: Grower) -> None:
    with thaw.open(grower.grown("random")) as repo:
        outline = OutlineHistory(repo).outline()
    waiting, seen = list(outline.roots), set[CommitId]()
    for first in waiting:
        one = outline.session(first)
        assert not seen & set(one.commits)
        seen |= set(one.commits)
        waiting += one.children
        if one.children:
            assert outline.ways_to(one.children[0])[0] == first
    assert seen == outline.commits.keys() and len(waiting) == outline.num_sessions


def where(repo: Repository, name: str) -> str:
    """What a row says of it, up to the first figure."""
    history = OutlineHistory(repo)
    outline = history.outline()
    away = outline.elsewhere(name)
    first = outline.first_of(repo.resolve(name).commit) if away is None else away.id
    html = parts.RowMaker(outline, history, link=str)._row(first, None)
    return str(html).replace("\u00a0", " ").partition("<small>")[2].partition(" · ")[0].partition("</small>")[0]


def remote_of(repo: Repository, folder: Path, name: str) -> str:
    folder.mkdir()
    return repo.add_remote(name, folder.as_uri()).url


def test_a_row_says_which_remotes_have_its_kv(repo: Repository, tmp_path: Path) -> None:
    """As they were last seen: what was not pushed is on disk alone, and so is all that a forgotten remote has."""
    grow(repo)
    assert where(repo, "main") == where(repo, "kid/0") == "on disk"
    for name in ("origin", "spare"):
        remote_of(repo, tmp_path / name, name)
    repo.push("main", remote="origin")
    repo.push("kid/0", remote="spare")
    assert where(repo, "main") == "on disk, on origin and on spare"
    assert where(repo, "kid/0") == "on disk and on spare" and where(repo, "kid/1") == "on disk"
    repo.remove_remote("spare")
    assert where(repo, "main") == "on disk and on origin" and where(repo, "kid/0") == "on disk"


def test_a_session_of_which_a_remote_has_the_beginning_says_so(repo: Repository, tmp_path: Path) -> None:
    session = repo.session()
    for i in range(3):
        session.append(f"turn {i} ")
        session.commit(f"turn {i}", branch="main")
        if i == 1:
            remote_of(repo, tmp_path / "origin", "origin")
            repo.push("main")
    repo.store.update_refs(RefUpdate("origin/main", "tag", repo.resolve("main~2").commit, "any", "an older one"))
    assert where(repo, "main") == "on disk"  # origin/main ends the session before it
    repo.push("main")
    assert where(repo, "main") == "on disk and on origin"
    session.append("turn 3 ")
    session.commit("turn 3", branch="main")
    session.append("turn 4 ")
    session.commit("turn 4", branch="main")
    assert where(repo, "main") == "on disk"


@pytest.fixture
def pushed(repo: Repository, tmp_path: Path) -> str:
    """A remote with main, two commits, and four forks of it."""
    grow(repo)
    url = remote_of(repo, tmp_path / "bucket", "origin")
    repo.push(all=True)
    return url


def test_a_branch_that_was_never_fetched_is_only_on_its_remote(pushed: str, repo: Repository, tmp_path: Path) -> None:
    """Nobody asks the remote while the tree is drawn: it is not even there."""
    thaw.clone(pushed, tmp_path / "clone", refs_only=True)
    (tmp_path / "bucket").rename(tmp_path / "away")
    with thaw.open(tmp_path / "clone") as clone:
        outline = OutlineHistory(clone).outline()
        assert (outline.num_commits, outline.num_sessions, outline.num_elsewhere) == (0, 0, 5)
        assert {name for names in outline.names.values() for name in names} == outline.remote_names
        assert where(clone, "origin/main") == where(clone, "origin/kid/2") == "only on origin"
        away = outline.elsewhere("origin/kid/2")
        assert away is not None and away.id == repo.resolve("kid/2").commit
        assert "thaw fetch origin kid/2<" in parts.not_fetched(outline, away)
        page = TreeFile(clone, "file.html", None, None)
        html = page.html()
        assert page.num_commits == 0 and "only\u00a0on\u00a0origin" in html and "5 commits not fetched" in html
        assert f'id="p-{short(away.id, 16)}"' in html and "thaw fetch origin kid/2" in html
    (tmp_path / "away").rename(tmp_path / "bucket")
    with thaw.open(tmp_path / "clone") as clone:
        clone.fetch("kid/2")
        assert where(clone, "origin/kid/2") == "on disk and on origin"
        # main is what kid/2 forked from, and came with it
        assert (
            where(clone, "origin/main") == "on disk and on origin" and where(clone, "origin/kid/1") == "only on origin"
        )
        names = OutlineHistory(clone).outline().names
        assert "origin/main" in names[clone.resolve("origin/main").commit]


def test_what_a_shallow_clone_left_in_its_remote_is_the_parent_of_what_it_brought(
    pushed: str, repo: Repository, tmp_path: Path
) -> None:
    thaw.clone(pushed, tmp_path / "clone", depth=1)
    main = repo.resolve("main").commit
    with thaw.open(tmp_path / "clone") as clone:
        history = OutlineHistory(clone)
        outline = history.outline()
        before = repo.resolve("main~1").commit
        away = outline.elsewhere(short(before, 16))
        assert away is not None and away.id == before and outline.commits[main].parent == before
        assert outline.roots == (before,) and outline.session(before).children == (main,)
        assert outline.ways_to(main) == [before] and outline.num_elsewhere == 1 and outline.num_commits == 5
        assert where(clone, short(before, 16)) == "only on origin" and where(clone, "main") == "on disk and on origin"
        assert "thaw fetch --unshallow origin" in parts.not_fetched(outline, away)
        # what it shares with a commit that is not here is not known, so nothing is called its own
        row = str(parts.RowMaker(outline, history, link=str)._row(main, None)).replace("\u00a0", " ")
        assert f"{outline.commits[main].num_tokens} tokens" in row and " own" not in row
        html = TreeFile(clone, "file.html", None, None).html()
        assert "thaw fetch --unshallow origin" in html and "1 commit not fetched" in html
        assert set(history.outline(only=main).commits) == set(outline.commits)
        clone.fetch(unshallow=True)
        whole = history.outline()
        assert whole.num_elsewhere == 0 and where(clone, short(before, 16)) == "on disk and on origin"


def test_a_namespace_is_told_of_its_own_remote_points_alone(repo: Repository, tmp_path: Path) -> None:
    url = remote_of(repo, tmp_path / "bucket", "origin")
    acme = repo.within("acme")
    for one, text in ((repo, "everybody's"), (acme, "acme's own")):
        with one.session() as session:
            session.append(text)
            session.commit(text, branch="main")
        one.push("main", remote="origin")
    thaw.clone(url, tmp_path / "clone", refs_only=True, namespace="acme")
    with thaw.open(tmp_path / "clone") as clone:
        assert OutlineHistory(clone).outline().num_elsewhere == 0
        assert set(OutlineHistory(clone.within("acme")).outline().commits) == {acme.resolve("main").commit}


def test_damaged_kv_is_told_with_the_remotes_that_have_it(repo: Repository, tmp_path: Path) -> None:
    grow(repo)
    remote_of(repo, tmp_path / "bucket", "origin")
    repo.push("main")
    with repo.store.database.write() as connection:
        connection.execute("DELETE FROM blobs")
    assert where(repo, "main") == "KV here damaged or gone: run `thaw fsck`; on origin"
    assert where(repo, "kid/0") == "KV here damaged or gone: run `thaw fsck`"


def test_no_page_is_deeper_than_a_browser_nests(repo: Repository) -> None:
    named_chain(repo, 400)
    outline = OutlineHistory(repo).outline()
    again = parts.unfold_again(outline, {}, (), 600)
    assert again.num_rows == parts.LEVELS == 200


def test_a_row_is_found_by_its_digits_and_by_nothing_else(repo: Repository) -> None:
    grow(repo)
    outline = OutlineHistory(repo).outline()
    commit = repo.resolve("main").commit
    assert outline.by_digits(short(commit, 16), 16) == commit
    assert all(outline.by_digits(name, 16) is None for name in ("main", "main~1", str(commit), short(commit, 12), ""))
    assert outline.first_of(commit) == outline.first_of(commit) == outline.session(outline.first_of(commit)).id


def test_running_text_that_is_spelled_out_leaves_the_first_page_room(repo: Repository) -> None:
    """With the most that its rows may have, it stays within what a first page has."""
    one = parts.RunningShown(
        name="0" * 32, branch="x" * 200, note="\U000e0041" * 400, parent=None, tail="\u202e" * 999 + "e"
    )  # fmt: skip
    html = parts.running([one] * 20, str)
    assert len(html.encode()) + parts.TREE_NBYTES < FILE_NBYTES - 10_000
    assert html.count("⟨U+202E⟩e</pre>") == parts.RUNNING and html.count("⟨U+202E⟩") > 1_000
    assert '<pre dir="auto">\nplain</pre>' in parts.running([msgspec.structs.replace(one, tail="plain")], str)
