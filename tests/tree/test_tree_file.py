"""`thaw show --html`: one file, small whatever the repository holds, in which nothing but our script runs."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest
from grown import Grower, long_names, named_chain
from hostile import HIDDEN, TEXT
from test_tree_markup import Seen

import thaw
from thaw.cli import main
from thaw.core.ids import short
from thaw.repo import Repository
from thaw.store import RefUpdate
from thaw.tree.details import _text_of
from thaw.tree.markup import visible
from thaw.tree.page import FILE_NBYTES, TreeFile

ELEMENTS = 2_000


class Page(Seen):
    """A page, with what stands in its templates counted apart: a browser makes no elements of it until it is asked."""

    def __init__(self, html: str) -> None:
        self.depth = 0
        self.inert: list[str] = []
        super().__init__(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "template":
            self.depth += 1
        if self.depth:
            self.inert.append(tag)
        else:
            super().handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag == "template"


def page_of(repo: Repository, point: str | None = None) -> str:
    return TreeFile(repo, "file.html", point, repo.engine.codec).html()


@pytest.mark.parametrize("shape", ["star", "chain", "comb", "random"])
def test_a_page_of_ten_thousand_commits_is_small_and_says_what_it_leaves_out(grower: Grower, shape: str) -> None:
    with thaw.open(grower.grown(shape)) as repo:
        file = TreeFile(repo, "file.html", None, None)
        html = file.html()
        assert len(html.encode()) <= FILE_NBYTES == 300_000
        page = Page(html)
        assert len(page.tags) <= ELEMENTS
        assert file.num_commits >= 10_000
        assert f"{file.num_commits:,} commits" in page.text.replace("\u00a0", " ")
        rows = page.attributes.count(("role", "treeitem"))
        if shape == "star":
            assert re.search(r"[\d,]+ more sessions, not in this file: thaw log --graph --all", page.text)
        if shape in ("comb", "random"):
            said = r">([\d,]+) commits? below, not in this file: <code>thaw show ([0-9a-f]{16}) --html file.html<"
            num, point = max(re.findall(said, html), key=lambda found: int(found[0].replace(",", "")))
            assert TreeFile(repo, "file.html", point, None).num_commits > int(num.replace(",", ""))
            assert 50 <= rows <= 200
        if shape == "chain":
            assert rows <= 5 and file.num_points >= 50


def test_long_texts_and_many_tokens_do_not_make_it_large(repo: Repository) -> None:
    for i in range(2):
        session = repo.session()
        session.append(f"{i} " + "<&>" * 3_000)
        session.generate("x", thaw.Sampling(max_tokens=650, logprobs=2))
        session.commit("<b>" * 9_000, branch=f"long/{i}")
        session.close()
    html = page_of(repo)
    assert len(html.encode()) <= FILE_NBYTES
    assert "characters left out: " in re.sub(r"<[^>]+>", "", html)


@pytest.mark.parametrize("path", ["file.html", "/x" * 2000, "/\u202e'" * 800])
def test_long_names_messages_and_paths_make_fewer_rows_and_no_larger_file(repo: Repository, path: str) -> None:
    """The longest names that a branch can have, messages that are spelled out, and paths that are in each command."""
    named_chain(repo, 150, message="\U000e0041" * 90, each=5)
    html = TreeFile(repo, path, None, None).html()
    assert len(html.encode()) <= FILE_NBYTES
    page = Page(html)
    assert len(page.tags) <= ELEMENTS and 1 <= page.attributes.count(("role", "treeitem")) <= 121
    assert re.search(r"\d+ commits? below, not in this file", page.text.replace("\u00a0", " "))


def test_a_commit_with_thousands_of_names_is_shown_with_its_turns(repo: Repository) -> None:
    with repo.session() as session:
        session.append("a document about a river. ")
        commit = session.commit("read").commit
    names = long_names(3_000)
    repo.store.update_refs(
        *(RefUpdate(name=name, kind="branch", target=commit, expect=None, reason="grown") for name in names)
    )
    html = page_of(repo)
    assert len(html.encode()) <= FILE_NBYTES and "a document about a river" in html
    assert "2996 more names" in html and "2,980 more names" in html


def test_a_remotes_names_make_it_no_larger(repo: Repository, tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    named_chain(repo, 1, each=3_000, length=190)
    repo.add_remote("origin", (tmp_path / "bucket").as_uri())
    repo.push(all=True)
    thaw.clone((tmp_path / "bucket").as_uri(), tmp_path / "clone", refs_only=True)
    with thaw.open(tmp_path / "clone") as clone:
        html = TreeFile(clone, "file.html", None, None).html()
    assert len(html.encode()) <= FILE_NBYTES and "thaw fetch origin" in html


def test_an_alternative_that_the_tokenizer_does_not_know_has_its_number(repo: Repository) -> None:
    assert _text_of(-1, repo.engine.codec) == "token -1" and _text_of(65, repo.engine.codec) == "A"
    assert _text_of(65, None) == "token 65"


def test_the_policy_lets_only_our_script_and_style_run(repo: Repository) -> None:
    session = repo.session()
    session.append(TEXT)
    session.commit(TEXT, branch="main")
    html = page_of(repo)
    seen = Page(html)
    assert seen.tags.count("script") == seen.tags.count("style") == 1
    (policy,) = [value for name, value in seen.attributes if name == "content" and value and "default-src" in value]
    assert "default-src 'none'" in policy and "form-action 'none'" in policy and "unsafe" not in policy
    for tag, name in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name == "style"]


def test_hostile_text_adds_no_element(repo: Repository) -> None:
    """The same session once with harmless letters in the same places: both pages have the same elements."""
    pages = []
    for i, said in enumerate((TEXT, re.sub(r"[^\n ]", "x", TEXT))):
        namespace = repo.within(f"n{i}")
        session = namespace.session()
        session.append(said, role="user")
        session.commit(said, branch="main")
        session.close()
        pages.append(Page(TreeFile(namespace, "file.html", None, None).html()))
    assert pages[0].tags == pages[1].tags and pages[0].inert == pages[1].inert
    assert visible(HIDDEN) in pages[0].text


def test_a_file_of_a_point_holds_what_led_to_it_and_came_of_it(
    repo: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = repo.session()
    session.append("a document. ")
    session.commit("read", branch="main")
    with repo.fork("main", 2) as kids:
        kids.generate(["a", "b"], thaw.Sampling(max_tokens=5))
        for i, kid in enumerate(kids):
            kid.commit(f"kid {i}", branch=f"kid/{i}")
    path = tmp_path / "out.html"
    assert main(["-C", str(repo.path), "show", "kid/0", "--html", str(path)]) in (0, None)
    told = path.read_text()
    assert "kid 0" in told and "read" in told and "kid 1" not in told
    assert f"p-{short(repo.resolve('kid/0').commit, 16)}" in told
    assert path.stat().st_mode & 0o777 == 0o600
    assert main(["-C", str(repo.path), "show", "--html", "-"]) in (0, None)
    assert "kid 1" in capsys.readouterr().out


def test_without_its_script_a_file_promises_no_more_than_it_has(repo: Repository) -> None:
    """What it says of choosing and of keys is there for the script alone."""
    session = repo.session()
    session.append("a document. ")
    session.commit("read", branch="main")
    seen = Page(page_of(repo))
    assert "Without JavaScript only the list" in seen.text and "Arrow keys" not in seen.text
    assert any(name == "data-said" and "Arrow keys" in (value or "") for name, value in seen.attributes)


def test_a_long_name_is_whole_in_its_title(repo: Repository) -> None:
    session = repo.session()
    session.append("a document. ")
    session.commit("read", branch="main")
    name = "langgraph/review/" + "0f" * 30
    repo.tag(name, "main")
    titles = [value for name, value in Page(page_of(repo)).attributes if name == "title"]
    assert titles == [f"tag: {name}"]


def test_an_empty_repository_has_a_page_too(repo: Repository) -> None:
    assert "No commits yet" in page_of(repo)


def test_damage_is_shown_where_it_is(repo: Repository) -> None:
    """A pack that is gone costs its own sessions, not the page."""
    session = repo.session()
    session.append("a document. " * 50)
    session.commit("read", branch="main")
    for pack in (repo.path / "packs").iterdir():
        pack.unlink()
    with thaw.open(repo.path) as again:
        html = TreeFile(again, "file.html", None, None).html()
    assert "read" in html
