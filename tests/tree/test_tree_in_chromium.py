"""A file of `thaw show --html` in a real browser: keys, comparing, a phone's width, and nothing hostile runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hostile import HIDDEN, MARKUP, TEXT

import thaw
from thaw.core.ids import short
from thaw.repo import Repository
from thaw.tree.markup import visible
from thaw.tree.page import TreeFile

if TYPE_CHECKING:
    from conftest import OpenTab


@pytest.fixture
def file(repo: Repository, tmp_path: Path) -> Path:
    """main, two forks of it, a conversation of three commits behind one, and hostile text everywhere."""
    session = repo.session()
    session.append("\n\n a document about a river. " * 10 + TEXT)
    session.commit(TEXT, branch="main")
    with repo.fork("main", 2) as kids:
        kids.generate(["Why? ", "Who? "], thaw.Sampling(max_tokens=30, logprobs=2))
        for i, kid in enumerate(kids):
            kid.commit(f"kid {i} {MARKUP[i]}", branch=f"kid/{i}")
    with repo.session("kid/1") as session:
        for i in range(3):
            session.append(f"more {i} ")
            session.commit(f"more {i}", branch="deep")
    path = tmp_path / "tree.html"
    path.write_text(TreeFile(repo, "tree.html", None, repo.engine.codec).html(), "utf-8")
    return path


def test_keys_move_in_the_tree_and_a_session_is_shown(file: Path, open_tab: OpenTab, repo: Repository) -> None:
    tab = open_tab()
    page = tab.page
    page.goto(file.as_uri())
    focused = "document.activeElement.closest('[role=treeitem]').dataset.point"
    ends = [short(repo.resolve(name).commit, 16) for name in ("main", "kid/1", "deep", "kid/0")]
    page.locator("[role=treeitem][tabindex='0']").focus()
    assert page.locator("[role=treeitem] a").evaluate_all("links => links.every((link) => link.tabIndex === -1)")
    seen = [page.evaluate(focused)]
    for _ in range(3):
        page.keyboard.press("ArrowDown")
        seen.append(page.evaluate(focused))
    assert seen == ends
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert page.locator("[role=treeitem]:visible").count() == 1
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("End")
    assert page.evaluate(focused) == ends[-1]
    page.keyboard.press("Enter")
    assert page.locator("[aria-selected=true]").get_attribute("data-point") == ends[-1]
    assert page.locator("#detail .turn").count() == 3
    assert page.locator("#detail .completion i[title]").count() == 30
    page.locator("#detail .completion i[title]").first.click()
    told = page.locator("#status").inner_text()
    assert "log probability" in told and ("over the next" in told or "under" in told)
    assert tab.wrong == []


def test_tokens_are_one_stop_of_the_tab_key_and_arrows_move_in_them(file: Path, open_tab: OpenTab) -> None:
    page = open_tab().page
    page.goto(file.as_uri())
    page.locator("[role=treeitem] > .row > a").nth(1).click()
    tokens = page.locator("#detail .completion i[title]")
    assert page.locator("#detail i[tabindex]").count() == 1
    page.locator("button.compare").focus()
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('i[title]')"):
            break
    for key, at in (("Enter", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 29), ("Home", 0)):
        page.keyboard.press(key)
        assert tokens.nth(at).evaluate("one => one === document.activeElement && one.matches('.chosen[tabindex]')")
        assert page.locator("#status").inner_text().split(" ✕")[0].endswith(tokens.nth(at).get_attribute("title"))
        assert page.locator("#detail i[tabindex]").count() == page.locator("#detail i.chosen").count() == 1
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Escape")
    assert page.locator("#status").inner_text() == ""


def test_escape_ends_a_comparison(file: Path, open_tab: OpenTab) -> None:
    page = open_tab().page
    page.goto(file.as_uri())
    rows = page.locator("[role=treeitem] > .row > a")
    rows.nth(1).click()
    page.locator("button.compare").click()
    page.keyboard.press("Escape")
    rows.nth(3).click()
    assert page.locator(".side").count() == 0
    page.locator("button.compare").click()
    rows.nth(1).click()
    assert page.locator(".side").count() == 2
    page.keyboard.press("Escape")
    assert page.locator(".side").count() == 0 and page.locator("#detail .turn").count() == 3
    assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"


def test_two_sessions_are_compared_where_they_part(file: Path, open_tab: OpenTab, repo: Repository) -> None:
    page = open_tab().page
    page.goto(file.as_uri())
    rows = page.locator("[role=treeitem] > .row > a")
    rows.nth(1).click()
    page.locator("button.compare").click()
    rows.nth(3).click()
    sides = page.locator(".side pre").all_text_contents()
    found = repo.diff("kid/1", "kid/0")
    assert sides == [visible(found.a.text), visible(found.b.text)]
    page.locator("text=Back to the session").click()
    assert page.locator("#detail .turn").count() == 3


def test_commits_inside_a_session_can_be_chosen(file: Path, open_tab: OpenTab, repo: Repository) -> None:
    page = open_tab().page
    page.goto(file.as_uri())
    page.locator("[role=treeitem] > .row > a").nth(2).click()
    page.locator("summary", has_text="3 commits").click()
    page.locator(".commits a").nth(2).click()
    assert short(repo.resolve("deep~2").commit, 16) in page.locator("#detail dl").inner_text()


def test_what_was_not_fetched_names_its_command_and_is_not_compared(
    repo: Repository, tmp_path: Path, open_tab: OpenTab
) -> None:
    for branch in ("main", "other"):
        with repo.session() as session:
            session.append(f"a document for {branch}. ")
            session.commit("read", branch=branch)
    (tmp_path / "bucket").mkdir()
    url = repo.add_remote("origin", (tmp_path / "bucket").as_uri()).url
    repo.push(all=True)
    thaw.clone(url, tmp_path / "clone", refs_only=True)
    file = tmp_path / "clone.html"
    with thaw.open(tmp_path / "clone") as clone:
        clone.fetch("main")
        file.write_text(TreeFile(clone, "clone.html", None, None).html(), "utf-8")
    tab = open_tab()
    page = tab.page
    page.goto(file.as_uri())
    rows = page.locator("[role=treeitem] > .row")
    assert "on\u00a0disk\u00a0and\u00a0on\u00a0origin" in (rows.nth(0).text_content() or "")
    assert "only\u00a0on\u00a0origin" in (rows.nth(1).text_content() or "")
    rows.nth(1).locator("a").click()
    assert "thaw fetch origin other" in page.locator("#detail").inner_text()
    rows.nth(0).locator("a").click()
    page.locator("button.compare").click()
    rows.nth(1).locator("a").click()
    assert "not in this file" in page.locator("#detail .warning").inner_text()
    assert tab.wrong == []


def test_hostile_text_does_nothing_and_is_seen(file: Path, open_tab: OpenTab) -> None:
    tab = open_tab()
    page = tab.page
    page.goto(file.as_uri())
    for i in range(4):
        page.locator("[role=treeitem] > .row > a").nth(i).click()
        assert page.locator("#detail .turn").count() >= 1
    assert page.evaluate("window.broken") is None
    assert tab.wrong == [] and tab.asked == [file.as_uri()]
    assert page.locator("#detail img, #detail svg, #detail script, #detail form, iframe, base").count() == 0
    said = page.locator("#detail .turn pre").first.text_content()
    assert said == visible("\n\n a document about a river. " * 10 + TEXT)
    assert visible(HIDDEN) in said


def test_a_script_that_got_in_would_not_run(file: Path, open_tab: OpenTab) -> None:
    """The check on the check: with the escaping gone, the policy still holds."""
    broken = file.with_name("broken.html")
    added = "<script>window.broken = 1</script><img src=x onerror='window.broken = 2'><p style='color:red'>x</p>"
    broken.write_text(file.read_text("utf-8").replace("<footer>", f"{added}<footer>"), "utf-8")
    tab = open_tab()
    tab.page.goto(broken.as_uri())
    assert tab.page.evaluate("window.broken") is None
    assert sum("Content Security Policy" in said for said in tab.wrong) >= 3
    without = file.with_name("without.html")
    without.write_text(broken.read_text("utf-8").replace("http-equiv", "name"), "utf-8")
    tab.page.goto(without.as_uri())
    assert tab.page.evaluate("window.broken") is not None


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (390, "dark"), (1200, "dark")])
def test_nothing_is_wider_than_the_screen(file: Path, open_tab: OpenTab, width: int, scheme: str) -> None:
    page = open_tab(width=width, scheme=scheme).page
    page.goto(file.as_uri())
    page.locator("[role=treeitem] > .row > a").nth(1).click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    back, fore = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (sum(_rgb(back)) < sum(_rgb(fore))) == (scheme == "dark")
    assert page.locator(".row > small").first.evaluate("e => parseFloat(getComputedStyle(e).fontSize)") >= 11


def _rgb(colour: str) -> list[int]:
    return [int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
