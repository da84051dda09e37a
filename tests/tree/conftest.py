"""A repository over the fake engine, and large ones."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from grown import Grower

import thaw
from thaw.engines.base import Engine
from thaw.repo import Repository


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with thaw.load_engine("fake") as running:
        yield running


@pytest.fixture
def repo(tmp_path: Path, engine: Engine) -> Iterator[Repository]:
    with thaw.open(tmp_path / "runs", engine=engine) as opened:
        yield opened


@pytest.fixture(scope="session")
def grower(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Grower:
    return Grower(tmp_path_factory.mktemp("grown"), engine)


CHROMIUM = "THAW_CHROMIUM"
"""The browser's path; where it is set and no browser is there, tests fail instead of being skipped."""
MISSING = "no Chromium here: the tree was not clicked through (apt-get install chromium, or set THAW_CHROMIUM)"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A real browser. While it is there an event loop runs in this thread, so it goes with its module."""
    named = os.environ.get(CHROMIUM)
    path = shutil.which(named or "chromium") or shutil.which("chromium-browser")
    if path is None or (named and not shutil.which(named)):
        (pytest.fail if named else pytest.skip)(MISSING)
    sync_api = pytest.importorskip("playwright.sync_api", reason="no Chromium here: no playwright (make install)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


class Tab:
    """A page of the browser, and what went wrong in it: scripts that failed or were refused, and addresses that it
    asked besides where it was led."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.wrong: list[str] = []
        self.asked: list[str] = []
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("console", lambda said: self.wrong.append(said.text) if said.type == "error" else None)
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("dialog", lambda dialog: (self.wrong.append("a dialog"), dialog.dismiss()))


OpenTab = Callable[..., Tab]


@pytest.fixture
def open_tab(chromium: Any) -> Iterator[OpenTab]:
    """`open_tab(width=390, scheme="dark")`: a tab of a browser without history, closed at the end."""
    contexts: list[Any] = []

    def begin(width: int = 1200, height: int = 800, scheme: str = "light") -> Tab:
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        context.set_default_timeout(20_000)
        contexts.append(context)
        return Tab(context.new_page())

    yield begin
    for context in contexts:
        context.close()
