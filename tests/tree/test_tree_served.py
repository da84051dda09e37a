"""`thaw serve` shows the tree: to who has a key, of its namespace alone, live, and no other site can send its forms."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import pytest
from grown import Grower, named_chain
from hostile import MARKUP, TEXT
from test_tree_file import ELEMENTS, Page

import thaw
from gateway_stand import TOKEN, Gateway
from reciting import reciting, say
from thaw.core.ids import short
from thaw.engines.base import Engine
from thaw.gateway.browser.logins import MOST
from thaw.gateway.engines import memory_of
from thaw.gateway.settings import GatewaySettings
from thaw.gateway.tenants import Quota, Tenant, Tenants, single
from thaw.testing.laws.kit import until
from thaw.tree.markup import visible

if TYPE_CHECKING:
    from conftest import OpenTab, Tab

FORM = {"content-type": "application/x-www-form-urlencoded"}


def signed_in(tab: Tab, gateway: Gateway) -> Any:
    """The tab's page, after its form took the key."""
    tab.page.goto(gateway.url)
    tab.page.fill("#key", TOKEN)
    tab.page.keyboard.press("Enter")
    return tab.page


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def serve(stack: ExitStack, folder: Path, engine: Engine, tenants: Tenants | None = None) -> Gateway:
    gateway = Gateway(folder, engine, tenants or single(TOKEN), GatewaySettings())
    stack.callback(gateway.close)
    return gateway


@pytest.fixture
def gateway(stack: ExitStack, tmp_path: Path, engine: Engine) -> Gateway:
    return serve(stack, tmp_path / "runs", engine)


class Visitor:
    """A browser without its screen."""

    def __init__(self, gateway: Gateway, key: str = TOKEN) -> None:
        self.http = httpx.Client(base_url=gateway.url, follow_redirects=True, timeout=30)
        self.home = self.http.post("/tree/login", data={"key": key})
        self.csrf = (re.search(r'name="csrf" value="([^"]+)"', self.home.text) or [None, ""])[1]

    def post(self, act: str, **form: str) -> httpx.Response:
        return self.http.post(f"/tree/{act}", data={"csrf": self.csrf, **form}, headers={"accept": "application/json"})

    def fork(self, point: str, **more: str) -> httpx.Response:
        form = {"point": point, "prompt": "Why?", "n": "2", "max_tokens": "8", "temperature": "1", "name": ""}
        return self.post("fork", **form | more)


def read(gateway: Gateway, said: str = "a long document. " * 20, branch: str = "main", namespace: str = "") -> str:
    repo = gateway.repo.within(namespace) if namespace else gateway.repo
    with repo.session() as session:
        session.append(said)
        return short(session.commit(said, branch=branch).commit, 16)


def test_without_a_login_there_is_a_form_and_nothing_else(gateway: Gateway) -> None:
    point = read(gateway, "the secret river")
    with httpx.Client(base_url=gateway.url) as client:
        home = client.get("/")
        assert home.status_code == 200 and 'type="password"' in home.text and "river" not in home.text
        for path in ("rows", f"point?at={point}", "diff?a=main&b=main", "version"):
            asked = client.get(f"/tree/{path}")
            assert asked.status_code == 401 and "river" not in asked.text
        for act in ("sessions", "fork", "adopt", "tag", "forget", "logout"):
            assert client.post(f"/tree/{act}", data={"point": point, "branch": "x"}).status_code == 401
        assert client.post("/tree/login", data={"key": "wrong"}).status_code == 401
        assert not client.cookies
    assert [ref.name for ref in gateway.repo.branches()] == ["main"]


def test_the_cookie_is_out_of_reach_and_a_logout_ends_it(gateway: Gateway) -> None:
    read(gateway)
    reply = httpx.post(f"{gateway.url}/tree/login", data={"key": TOKEN})
    told = reply.headers["set-cookie"].lower()
    assert "httponly" in told and "samesite=strict" in told and TOKEN not in told and reply.status_code == 303
    visitor = Visitor(gateway)
    assert TOKEN not in visitor.home.text and "a long document" in visitor.home.text
    cookies = dict(visitor.http.cookies)
    assert httpx.get(f"{gateway.url}/tree/version", cookies=cookies).status_code == 200
    visitor.http.post("/tree/logout", data={"csrf": visitor.csrf})
    assert not visitor.http.cookies
    assert httpx.get(f"{gateway.url}/tree/version", cookies=cookies).status_code == 401


def test_gateways_at_two_ports_of_a_host_do_not_end_each_others_logins(
    stack: ExitStack, tmp_path: Path, engine: Engine, open_tab: OpenTab
) -> None:
    """A browser sends a host's cookies to all of its ports."""
    gateways = [serve(stack, tmp_path / name, engine) for name in ("a", "b")]
    tab = open_tab()
    for gateway in gateways:
        signed_in(tab, gateway).locator("#totals").wait_for()
    for gateway in gateways:
        tab.page.goto(gateway.url)
        tab.page.locator("button", has_text="Log out").wait_for()
    tab.page.locator("button", has_text="Log out").click()
    tab.page.locator("#key").wait_for()
    tab.page.goto(gateways[0].url)
    tab.page.locator("#totals").wait_for()


def test_many_logins_end_none_of_another_tenants(stack: ExitStack, tmp_path: Path, engine: Engine) -> None:
    gateway = serve(stack, tmp_path / "runs", engine, two())
    owner, first = Visitor(gateway, "key-a"), Visitor(gateway, "key-b")
    for _ in range(MOST):
        httpx.post(f"{gateway.url}/tree/login", data={"key": "key-b"})
    assert owner.http.get("/tree/version").status_code == 200
    assert first.http.get("/tree/version").status_code == 401


def test_every_reply_forbids_scripts_frames_and_caches(gateway: Gateway) -> None:
    read(gateway, TEXT)
    visitor = Visitor(gateway)
    paths = (
        "/",
        "/tree/rows",
        "/tree/point?at=main",
        "/tree/point?at=nothing",
        "/tree/diff?a=main&b=x",
        "/tree/version",
    )
    for path in (*paths, "/tree/static/tree.js", "/tree/static/../parts.py"):
        headers = visitor.http.get(path).headers
        if path.endswith(".py"):
            continue
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    page = Page(visitor.home.text)
    assert page.tags.count("script") == 1 and "style" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "style"]


def test_a_page_that_was_led_here_by_another_name_gets_nothing(gateway: Gateway) -> None:
    visitor = Visitor(gateway)
    for path in ("/", "/tree/version", "/tree/point?at=main"):
        assert visitor.http.get(path, headers={"host": "evil.example"}).status_code == 421


ACTS: tuple[tuple[str, dict[str, str]], ...] = (
    ("fork", {"point": "main", "prompt": "x", "n": "1", "max_tokens": "4", "temperature": "1", "name": "f"}),
    ("adopt", {"point": "main", "branch": "adopted"}),
    ("tag", {"point": "main", "name": "tagged"}),
    ("forget", {"point": "other", "what": "branch:other"}),
)


@pytest.mark.parametrize(("act", "form"), ACTS)
def test_nothing_changes_without_the_logins_own_token_and_origin(
    gateway: Gateway, act: str, form: dict[str, str]
) -> None:
    read(gateway)
    read(gateway, branch="other")
    visitor, another = Visitor(gateway), Visitor(gateway)

    def refs() -> list[Any]:
        return [(ref.name, ref.target) for ref in (*gateway.repo.branches(), *gateway.repo.tags())]

    before = refs()
    good = {**form, "csrf": visitor.csrf}
    tries: list[tuple[dict[str, str], dict[str, str]]] = [
        (form, {}),
        ({**form, "csrf": ""}, {}),
        ({**form, "csrf": another.csrf}, {}),
        (good, {"origin": "https://evil.example"}),
        (good, {"origin": "null"}),
        (good, {"sec-fetch-site": "cross-site"}),
        (good, {"sec-fetch-site": "same-site"}),
    ]
    for body, headers in tries:
        assert visitor.http.post(f"/tree/{act}", data=body, headers=headers).status_code == 403
    json = visitor.http.post(f"/tree/{act}", json=good)
    assert json.status_code == 400
    assert visitor.http.get(f"/tree/{act}", params=good).status_code == 405
    assert refs() == before
    assert visitor.http.post(f"/tree/{act}", data=good, headers={"origin": gateway.url}).status_code == 200
    assert refs() != before


def test_a_login_from_another_site_is_refused(gateway: Gateway) -> None:
    headers = {"origin": "https://evil.example"}
    assert httpx.post(f"{gateway.url}/tree/login", data={"key": TOKEN}, headers=headers).status_code == 403


def two() -> Tenants:
    def digest(key: str) -> bytes:
        return hashlib.sha256(key.encode()).digest()

    return Tenants({digest("key-a"): Tenant("a", Quota()), digest("key-b"): Tenant("b", Quota())})


def test_a_tenant_sees_and_changes_its_own_namespace_alone(stack: ExitStack, tmp_path: Path, engine: Engine) -> None:
    """Each try is made by the owner as well, and succeeds there."""
    gateway = serve(stack, tmp_path / "runs", engine, two())
    theirs = read(gateway, "the secret river", "secret", "a")
    mine = read(gateway, "my own", "main", "b")
    owner, other = Visitor(gateway, "key-a"), Visitor(gateway, "key-b")
    assert "the secret river" in owner.home.text and "my own" not in owner.home.text
    assert "my own" in other.home.text and "secret" not in other.home.text
    looks = (f"/?at={theirs}", f"/tree/point?at={theirs}", "/tree/point?at=secret", f"/tree/diff?a={theirs}&b={theirs}")
    for path in (*looks, f"/tree/rows?of={theirs}"):
        assert "river" not in other.http.get(path).text
        assert owner.http.get(path).status_code == 200
    for path in looks:
        assert "river" in owner.http.get(path).text
    for act, form in (
        ("adopt", {"point": theirs, "branch": "x"}),
        ("tag", {"point": theirs, "name": "x"}),
        ("forget", {"point": theirs, "what": "branch:secret"}),
        ("forget", {"point": mine, "what": "branch:secret"}),
        ("adopt", {"point": "@a/secret", "branch": "x"}),
    ):
        assert other.post(act, **form).status_code in (400, 404)
    assert other.fork(theirs).status_code == 404
    assert [ref.name for ref in gateway.repo.within("a").branches()] == ["secret"]
    assert owner.post("tag", point=theirs, name="x").status_code == 200
    version = other.http.get("/tree/version").text
    read(gateway, "one more", "secret2", "a")
    assert other.http.get("/tree/version").text == version
    assert "one more" in owner.http.get("/").text


@pytest.mark.parametrize("shape", ["star"])
def test_the_first_page_of_ten_thousand_commits_is_small_and_the_rest_is_asked_for(
    stack: ExitStack, grower: Grower, engine: Engine, shape: str
) -> None:
    gateway = serve(stack, grower.grown(shape), engine)
    visitor = Visitor(gateway)
    assert len(visitor.home.content) <= 300_000
    page = Page(visitor.home.text)
    assert len(page.tags) <= ELEMENTS
    more = [value for name, value in page.attributes if name == "data-of"]
    assert more
    of = next(value for value in more if value) if shape == "star" else more[-1]
    seen: set[str] = set()
    start = 0
    for _ in range(4):
        rows = visitor.http.get("/tree/rows", params={"of": of, "from": str(start)}).text
        found = re.findall(r'id="(s-[0-9a-f]+)"', rows)
        assert not seen.intersection(found)
        seen.update(found)
        start += 50
        if "more session" not in rows:
            break
    assert len(seen) >= (200 if shape == "star" else 1)
    again = visitor.http.post("/tree/sessions", data={"open": ":50", "shut": "", "at": ""})
    assert again.status_code == 200 and len(again.content) <= 1_000_000


def test_fork_adopt_tag_and_forget_do_what_the_verbs_do(gateway: Gateway) -> None:
    point = read(gateway)
    visitor = Visitor(gateway)
    assert visitor.fork("main", n="3").json()["said"] == "3 children: fork/0 … fork/2"
    wait_for(visitor, "fork/2")
    repo = gateway.repo
    for i in range(3):
        shown = repo.show(f"fork/{i}")
        assert short(shown.entry.parents[0], 16) == point
        assert shown.turns[-2].text == "Why?" and shown.turns[-1].end - shown.turns[-1].start == 8
    assert len({repo.show(f"fork/{i}").turns[-1].text for i in range(3)}) == 3
    assert visitor.post("adopt", point="fork/1", branch="main").status_code == 200
    assert repo.resolve("main").commit == repo.resolve("fork/1").commit
    assert visitor.post("tag", point="fork/0", name="good").status_code == 200
    assert visitor.post("forget", point="fork/2", what="branch:fork/2").status_code == 200
    assert visitor.post("forget", point="good", what="tag:good").status_code == 200
    assert [ref.name for ref in repo.branches()] == ["fork/0", "fork/1", "main"] and repo.tags() == []
    inside = visitor.fork("main:turn=1", n="1", name="inside")
    assert inside.status_code == 200
    for bad in (
        {"n": "0"},
        {"n": "17"},
        {"n": "11", "name": "x" * 198},
        {"n": "x"},
        {"max_tokens": "99999"},
        {"temperature": "nan"},
        {"name": "../x"},
    ):
        assert visitor.fork("main", **bad).status_code == 400
    assert visitor.post("adopt", point="main", branch="HEAD").status_code == 400


def test_a_panel_that_is_out_of_date_deletes_and_moves_nothing(gateway: Gateway) -> None:
    """What a name is must be where the panel showed it; a new panel acts, and its deletion can be taken back."""
    shown, other, repo = read(gateway), read(gateway, branch="other"), gateway.repo
    visitor = Visitor(gateway)

    def panel(point: str) -> dict[str, str]:
        found = visitor.http.get(f"/tree/point?at={point}").text
        return dict(re.findall(r'<input type="hidden" name="(point|seen)" value="(\w+)"', found))

    assert "fake (Fake), uint8" in visitor.http.get(f"/tree/point?at={shown}").text
    stale = panel(shown)
    assert visitor.post("adopt", **panel(other), branch="main").status_code == 200
    main = repo.resolve("main").commit
    for act, form in (
        ("forget", {**stale, "what": "branch:main"}),
        ("adopt", {**stale, "branch": "main"}),
    ):
        refused = visitor.post(act, **form)
        assert refused.status_code == 409 and short(main) in refused.json()["error"], refused.text
        assert "nothing was" in refused.json()["error"] and repo.resolve("main").commit == main
    repo.tag("kept", shown)
    stale = panel(shown)
    repo.delete_tag("kept")
    repo.tag("kept", other)
    assert visitor.post("forget", **stale, what="tag:kept").status_code == 409
    done = visitor.post("forget", **panel(other), what="branch:main").json()
    assert "`thaw undo main` brings it back" in done["said"] and done["at"] == other
    assert repo.undo("main").new == main
    assert visitor.post("adopt", **panel(other), branch="main").status_code == 200


def test_what_is_shown_after_a_name_is_forgotten(gateway: Gateway) -> None:
    """The commit, as long as anything has it."""
    point = read(gateway)
    gateway.repo.tag("kept", "main")
    visitor = Visitor(gateway)
    assert visitor.post("forget", point=point, what="tag:kept").json()["at"] == point
    assert visitor.post("forget", point=point, what="branch:main").json()["at"] is None


def test_forks_while_forks_run_get_branches_of_their_own(speaking: Gateway) -> None:
    """A branch is made when its child ends; until then its name is taken, too."""
    read(speaking, namespace="acme")
    visitor = Visitor(speaking)
    long = {"prompt": say("and so on " * 30), "n": "2", "max_tokens": "300"}
    with ThreadPoolExecutor(4) as threads:
        said = [done.json()["said"] for done in threads.map(lambda _: visitor.fork("main", **long), range(4))]
    prefixes = ("fork", "fork2", "fork3", "fork4")
    assert sorted(said) == sorted(f"2 children: {name}/0 … {name}/1" for name in prefixes)
    assert visitor.fork("main", name="fork3").status_code == 400
    wanted = {"main", *(f"{name}/{i}" for name in prefixes for i in range(2))}
    until(lambda: {ref.name for ref in speaking.repo.within("acme").branches()} == wanted, 120)


def wait_for(visitor: Visitor, name: str) -> None:
    for _ in range(400):
        if f">{name}<" in visitor.http.get("/").text:
            return
        time.sleep(0.05)
    raise AssertionError(f"{name} never came")


def test_responses_on_no_branch_are_shown_until_they_are_forgotten(gateway: Gateway) -> None:
    client = gateway.openai()
    first = client.responses.create(model="fake", input="what the agent asked", max_output_tokens=8)
    second = client.responses.create(model="fake", input="and then", previous_response_id=first.id, max_output_tokens=8)
    visitor = Visitor(gateway)
    end = short(second.thaw["point"], 16)
    assert f'data-point="{end}"' in visitor.home.text and "in\u00a0host\u00a0memory" in visitor.home.text
    assert visitor.post("forget", point=end, what="response:").status_code == 200
    again = visitor.post("forget", point=end, what="response:")
    assert again.status_code == 400 and "nothing was forgotten" in again.json()["error"]
    assert f'data-point="{end}"' not in visitor.http.get("/").text
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert httpx.get(f"{gateway.url}/v1/responses/{second.id}", headers=headers).status_code == 404
    assert httpx.get(f"{gateway.url}/v1/responses/{first.id}", headers=headers).status_code == 200


def test_what_a_remote_has_is_shown_and_looking_fetches_nothing(
    stack: ExitStack, tmp_path: Path, engine: Engine, open_tab: OpenTab
) -> None:
    """The remote is out of reach while the page is looked at; then its branch is fetched, and the page sees it."""
    (tmp_path / "bucket").mkdir()
    with thaw.open(tmp_path / "runs", engine=engine) as repo:
        for i in range(3):
            with repo.session("main") if i else repo.session() as session:
                session.append(f"the river {i} ")
                session.commit(f"turn {i}", branch="main")
        with repo.session("main~1") as session:
            session.append("another way")
            session.commit("another way", branch="other")
        repo.add_remote("origin", (tmp_path / "bucket").as_uri())
        repo.push(all=True)
    thaw.clone((tmp_path / "bucket").as_uri(), tmp_path / "clone", refs_only=True)
    with thaw.open(tmp_path / "clone") as clone:
        clone.fetch("main", depth=1)
    (tmp_path / "bucket").rename(tmp_path / "away")
    gateway = serve(stack, tmp_path / "clone", engine)
    visitor = Visitor(gateway)
    told = visitor.http.get("/").text.replace("\u00a0", " ")
    assert told.count("only on origin") == 2 and told.count("on disk and on origin") == 1
    assert "origin/other" in told and "2 commits not fetched" in told and "2 branches of remotes" in told
    for path in ("/tree/point?at=origin/other", "/?at=origin/other"):
        assert "thaw fetch origin other" in visitor.http.get(path).text
    assert "was not fetched" in visitor.http.get("/tree/diff?a=origin/main&b=origin/other").text
    point = visitor.http.get("/tree/point?at=origin/main").text
    assert "on disk and on origin" in point and "tag:origin" not in point and "branch:origin" not in point
    assert len(list(gateway.repo.store.commits())) == 1

    tab = open_tab()
    page = signed_in(tab, gateway)
    rows = page.locator("[role=treeitem] > .row")
    rows.filter(has_text="origin/other").locator("a").click()
    page.locator("#detail code", has_text="thaw fetch origin other").wait_for()
    rows.filter(has_text="origin/main").locator("a").click()
    page.locator("#detail h2", has_text="origin/main").wait_for()
    (tmp_path / "away").rename(tmp_path / "bucket")
    with thaw.open(tmp_path / "clone") as clone:
        clone.fetch(unshallow=True)
    rows.filter(has_text="origin/other").filter(has_text="disk").wait_for()
    assert page.locator("#totals", has_text="not fetched").count() == 0
    assert tab.wrong == []


def test_open_sessions_are_where_their_engine_keeps_them(engine: Engine) -> None:
    """Served engines keep idle ones in their arena, in host memory; others where they compute."""

    def places(name: str, device: str) -> tuple[str, str]:
        info = msgspec.structs.replace(engine.info, name=name, device=device)
        return memory_of(info, running=True), memory_of(info, running=False)

    host, gpu = "in host memory", "on the GPU"
    assert places("fake", engine.info.device) == places("vllm", "cpu") == (host, host)
    assert places("transformers", "cuda:0") == (gpu, gpu)
    assert places("vllm", "cuda:0") == places("sglang", "cuda") == (gpu, host)


def test_no_key_and_no_text_is_in_the_audit_line(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "thaw.gateway")
    logging.getLogger("thaw.gateway.audit").propagate = True
    read(gateway, "the secret river")
    Visitor(gateway).fork("main", prompt="a secret prompt")
    assert '"endpoint":"/tree/fork"' in caplog.text
    httpx.post(f"{gateway.url}/tree/login", data={"key": "a-wrong-key"})
    assert '"endpoint":"/tree/login","status":401' in caplog.text and "a-wrong-key" not in caplog.text
    assert TOKEN not in caplog.text and "secret" not in caplog.text


def test_the_whole_story_in_a_browser(gateway: Gateway, open_tab: OpenTab) -> None:
    """Log in, look, fork, watch the children come, compare two, adopt one, tag it, forget another, log out."""
    read(gateway, "a document about a river. " * 10 + MARKUP[1])
    tab = open_tab()
    page = signed_in(tab, gateway)
    page.locator("[role=treeitem] > .row > a").first.click()
    page.locator("summary", has_text="Fork").click()
    page.fill("textarea[name=prompt]", f"Why? {MARKUP[0]}")
    page.fill("input[name=n]", "3")
    page.fill("input[name=max_tokens]", "12")
    page.locator("form[action='/tree/fork'] button").click()
    rows = page.locator("[role=treeitem] > .row")
    rows.filter(has_text="fork/2").wait_for()
    rows.filter(has_text="fork/0").wait_for()
    gateway.openai().completions.create(model="fake", prompt="an agent at work", max_tokens=8)
    rows.filter(has_text="completion").wait_for()
    rows.filter(has_text="fork/0").locator("a").click()
    page.locator("#detail h2", has_text="fork/0").wait_for()
    assert page.locator("#detail .completion i[title]").count() == 12
    page.locator("button.compare").click()
    rows.filter(has_text="fork/1").locator("a").click()
    page.locator(".side").nth(1).wait_for()
    assert page.locator(".side h3").all_text_contents() == ["fork/0", "fork/1"]
    page.locator("text=Back to the session").click()
    page.locator("summary", has_text="Adopt").click()
    page.locator("form[action='/tree/adopt'] button").click()
    page.locator("#detail h2", has_text="main").wait_for()
    page.locator("summary", has_text="Tag").click()
    page.fill("form[action='/tree/tag'] input[name=name]", "winner")
    page.locator("form[action='/tree/tag'] button").click()
    page.locator("#detail h2", has_text="winner").wait_for()
    rows.filter(has_text="fork/2").locator("a").click()
    page.locator("#detail h2", has_text="fork/2").wait_for()
    page.locator("summary", has_text="Forget").click()
    page.locator("form[action='/tree/forget'] button").click()
    rows.filter(has_text="fork/2").wait_for(state="detached")
    assert gateway.repo.resolve("main").commit == gateway.repo.resolve("fork/0").commit
    assert gateway.repo.resolve("winner").commit == gateway.repo.resolve("fork/0").commit
    assert [ref.name for ref in gateway.repo.branches()] == ["fork/0", "fork/1", "main"]
    page.locator("button", has_text="Log out").click()
    page.locator("#key").wait_for()
    assert page.evaluate("window.broken") is None and tab.wrong == []
    assert {url for url in tab.asked if not url.startswith((gateway.url, "data:"))} == set()


@pytest.fixture
def speaking(stack: ExitStack, tmp_path: Path) -> Gateway:
    """A model that slowly says what it is told to."""
    engine = stack.enter_context(reciting(step_s=0.004))
    tenants = {
        hashlib.sha256(name.encode()).digest(): Tenant(namespace, Quota())
        for name, namespace in ((TOKEN, "acme"), ("another", "other"))
    }
    return serve(stack, tmp_path / "speaking", engine, Tenants(tenants))


def begin_saying(gateway: Gateway, text: str, key: str = TOKEN) -> Any:
    client = gateway.openai(key)
    return client.responses.create(model="fake", input=f"Go. {say(text)}", max_output_tokens=4000, background=True)


def test_what_runs_is_shown_to_its_tenant_and_followed_from_its_beginning(speaking: Gateway) -> None:
    own, others = Visitor(speaking), Visitor(speaking, "another")
    began = begin_saying(speaking, TEXT)
    name = ""
    while not name:
        found = re.search(r'<details data-request="([0-9a-f]+)"', own.http.get("/").text)
        name = found[1] if found else ""
    assert "data-request" not in others.http.get("/").text
    assert others.http.get(f"/tree/follow?request={name}").status_code == 404
    assert own.http.get("/tree/follow?request=nothing").status_code == 404
    told, last = "", ""
    with own.http.stream("GET", f"/tree/follow?request={name}") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            last = line or last
            told += json.loads(line[6:]) if line.startswith("data: ") and line != "data: 0" else ""
    done = speaking.openai().responses.retrieve(began.id)
    assert told == visible(done.output_text) == visible(TEXT) and last == "data: 0"
    assert "data-request" not in own.http.get("/").text


def test_text_grows_in_a_browser_and_stays_inert(speaking: Gateway, open_tab: OpenTab) -> None:
    tab = open_tab()
    page = signed_in(tab, speaking)
    page.locator("#running").wait_for(state="attached")
    text = TEXT + " and so on" * 60
    began = begin_saying(speaking, text)
    entry = page.locator("#running details")
    entry.locator("summary").click()
    lengths: list[int] = []
    while page.locator("#running .over").count() == 0:
        lengths.append(len(entry.locator("pre").text_content() or ""))
    assert sorted(lengths) == lengths and len(set(lengths)) > 5
    assert speaking.openai().responses.retrieve(began.id).output_text == text
    assert entry.locator("pre").text_content() == visible(text)
    page.locator("[role=treeitem] > .row").first.wait_for()
    entry.locator("summary").click()
    entry.wait_for(state="detached")
    assert page.evaluate("window.broken") is None and tab.wrong == []
    assert {url for url in tab.asked if not url.startswith((speaking.url, "data:"))} == set()


def test_children_are_named_while_they_run_and_their_texts_grow_side_by_side(
    speaking: Gateway, open_tab: OpenTab
) -> None:
    first = speaking.openai().responses.create(model="fake", input=f"Go. {say('yes')}", max_output_tokens=40)
    tab = open_tab()
    page = signed_in(tab, speaking)
    page.locator("[role=treeitem] > .row > a").first.click()
    page.locator("summary", has_text="Fork").click()
    text = MARKUP[1] + " and so on" * 100
    page.fill("textarea[name=prompt]", f"{MARKUP[0]} {say(text)}")
    page.fill("input[name=max_tokens]", "2000")
    page.locator("form[action='/tree/fork'] button").click()
    entries = page.locator("#running details")
    entries.nth(1).wait_for()
    assert entries.locator("summary b").all_text_contents() == ["fork/0", "fork/1"]
    assert (entries.nth(0).locator("q").text_content() or "").startswith(MARKUP[0])
    assert entries.nth(0).locator("summary a").text_content() == short(first.thaw["point"], 16)
    for i in range(2):
        entries.nth(i).locator("summary").click()
    page.locator("#running .over").nth(1).wait_for(timeout=120_000)
    assert [entries.nth(i).locator("pre").text_content() for i in range(2)] == [text, text]
    assert sorted(entries.locator("summary").all_text_contents()) == [
        f"fork/{i} is over; its session is in the tree" for i in range(2)
    ]
    entries.locator("a", has_text="its session").first.click()
    page.locator("#detail h2", has_text="fork/").wait_for()
    assert page.evaluate("window.broken") is None and tab.wrong == []


def test_many_texts_at_once_leave_the_page_its_connections(speaking: Gateway, open_tab: OpenTab) -> None:
    """A browser has six to one address; with all of them taken by streams nothing else would be answered."""
    tab = open_tab()
    page = signed_in(tab, speaking)
    page.locator("#running").wait_for(state="attached")
    for _ in range(7):
        begin_saying(speaking, "and so on " * 150)
    entries = page.locator("#running details")
    entries.nth(6).wait_for()
    for i in range(7):
        entries.nth(i).locator("summary").click()
    page.locator("#status", has_text="fold one first").wait_for()
    until(lambda: page.locator("#running details[open]").count() == 4)
    assert page.evaluate("fetch('/tree/version').then((reply) => reply.status)") == 200
    assert page.locator("#running .over").count() == 0
    assert tab.wrong == []


def test_the_row_of_what_is_shown_is_marked_and_ages_grow(gateway: Gateway, open_tab: OpenTab) -> None:
    """A click, while the tree is asked for anew; then an action of another window, and a panel that is out of date."""
    points = [read(gateway, f"document {name} " * 40, name) for name in ("main", "other")]
    gateway.repo.tag("kept", "main")
    tab = open_tab(width=390, height=600)
    page = signed_in(tab, gateway)
    rows = page.locator("[role=treeitem]")
    rows.filter(has_text="other").locator("a").click()
    page.locator("#detail h2", has_text="other").wait_for()
    held: list[Any] = []

    def hold(route: Any) -> None:
        held.append(route)

    page.route("**/tree/sessions", hold)
    gateway.repo.branch("third", points[1])
    until(lambda: bool(page.evaluate("1") and held))
    rows.filter(has_text="document main").locator("a").click()
    page.locator("#detail h2", has_text="main").wait_for()
    held[0].continue_()
    page.unroute("**/tree/sessions")
    rows.filter(has_text="third").wait_for()
    assert page.locator("[aria-selected=true]").get_attribute("data-point") == points[0]
    assert page.url.endswith(points[0])

    page.evaluate("""for (const one of document.querySelectorAll("time"))
        one.dateTime = new Date(Date.now() - 150e3).toISOString()""")
    page.locator("time", has_text="2\u00a0minutes\u00a0ago").nth(1).wait_for()

    gateway.repo.adopt("other", "main")
    page.locator("summary", has_text="Forget").click()
    status = page.locator("#status")
    page.locator("select[name=what]").select_option("branch:main")
    page.locator("form[action='/tree/forget'] button").click()
    page.locator("#status.error", has_text="nothing was deleted").wait_for()
    box = status.bounding_box()
    assert page.evaluate("scrollY") > 100 and box["y"] > 0 and box["y"] + box["height"] <= 600
    assert page.locator("select[name=what] option").all_text_contents() == ["tag: kept"]
    page.locator("summary", has_text="Forget").click()
    page.locator("form[action='/tree/forget'] button").click()
    page.locator("#status.done", has_text="`thaw undo kept`").wait_for()
    assert "not in the tree any more" in page.locator("#detail").inner_text() and page.url.endswith("/")
    assert [one for one in tab.wrong if "409" not in one] == []


def test_an_error_takes_no_place_of_the_tree(gateway: Gateway, open_tab: OpenTab) -> None:
    """The gateway is busy, or is started anew: what is shown stays, and is brought up to date after."""
    point = read(gateway)
    with gateway.repo.session("main") as session:
        session.append("more")
        session.commit("more", branch="main")
    gateway.repo.branch("first", point)
    tab = open_tab()
    page = signed_in(tab, gateway)
    rows = page.locator("[role=treeitem] > .row")
    rows.nth(1).wait_for()
    page.route("**/tree/sessions", lambda route: route.fulfill(status=503, body="<p>busy</p>"))
    read(gateway, branch="other")
    page.locator("#status", has_text="does not answer").wait_for()
    assert rows.count() == 2 and page.locator("#totals").count() == 1 and "null" not in page.locator("nav").inner_text()
    page.unroute("**/tree/sessions")
    rows.filter(has_text="other").wait_for()
    page.route("**/tree/point*", lambda route: route.abort())
    rows.first.locator("a").click()
    page.locator("#status", has_text="did not answer").wait_for()
    assert [one for one in tab.wrong if "Failed to load" not in one] == []


def test_rows_that_are_asked_for_twice_are_there_once(
    stack: ExitStack, tmp_path: Path, engine: Engine, grower: Grower, open_tab: OpenTab
) -> None:
    """Two presses of a key before the first one is answered."""
    gateway = serve(stack, grower.grown("star", 200), engine)
    tab = open_tab()
    page = signed_in(tab, gateway)
    more = page.locator("[role=treeitem].more")
    more.last.wait_for()
    before = page.locator("[role=treeitem]:not(.more)").count()
    more.last.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    until(lambda: page.locator("[role=treeitem]:not(.more)").count() == before + 50)
    focused = page.evaluate("document.activeElement.closest('[role=treeitem]').getAttribute('tabindex')")
    assert focused == "0" and page.locator("[role=treeitem][tabindex='0']").count() == 1
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids)) and tab.wrong == []


@pytest.mark.parametrize("width", [390, 1200])
def test_rows_below_many_forks_can_be_read(
    stack: ExitStack, tmp_path: Path, engine: Engine, open_tab: OpenTab, width: int
) -> None:
    with thaw.open(tmp_path / "runs", engine=engine) as repo:
        named_chain(repo, 130)
    gateway = serve(stack, tmp_path / "runs", engine)
    page = signed_in(tab := open_tab(width=width), gateway)
    rows = page.locator("[role=treeitem] > .row")
    rows.nth(110).wait_for()
    boxes = rows.evaluate_all("rows => rows.map((row) => row.getBoundingClientRect().width)")
    assert len(boxes) >= 110 and min(boxes) > 180
    assert page.evaluate("document.documentElement.scrollWidth") <= width and tab.wrong == []


def test_without_its_script_the_page_still_works(gateway: Gateway, chromium: Any) -> None:
    read(gateway)
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(gateway.url)
    page.fill("#key", TOKEN)
    page.locator("button").click()
    for _ in range(9):
        page.keyboard.press("Tab")
        if page.locator("[role=treeitem] a:focus").count():
            break
    page.keyboard.press("Enter")
    page.locator("summary", has_text="Tag").click()
    page.fill("form[action='/tree/tag'] input[name=name]", "plain")
    page.locator("form[action='/tree/tag'] button").click()
    page.locator("#detail h2", has_text="plain").wait_for()
    context.close()
    assert [ref.name for ref in gateway.repo.tags()] == ["plain"]
