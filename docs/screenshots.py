"""Take the pictures of docs/tree.md: a real model, a real gateway, a real Chromium.

    python docs/screenshots.py          # needs the extras [server,testing], `make model`, and Chromium

It reads a short document, forks it, serves it, and clicks. The pictures are small, since they are part of the clone.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import thaw
from thaw.demo.model import ensure_demo_model
from thaw.gateway import server
from thaw.gateway.settings import GatewaySettings
from thaw.gateway.tenants import single

DOCS = Path(__file__).resolve().parent
KEY = "the-key-that-thaw-serve-printed"
DOCUMENT = (
    "You answer questions about this handbook. The pump stands in the cellar of the old mill. It was built in 1931 and "
    "is tested on Mondays. When the river rises above two metres, the pump starts by itself. The key to the cellar "
    "hangs behind the door of the office. Nobody may enter the cellar alone. Every test is written into the blue book, "
    "with the date and the level."
)
QUESTIONS = ("When is the pump tested?", "Where is the key?")
SAMPLING = thaw.Sampling(max_tokens=48, temperature=0.7, logprobs=2)
LEVELS = 4
"""Bits of a colour that are kept."""


def make(repo: Any) -> None:
    """A conversation with two questions, and two answers to each."""
    with repo.session(seed=11) as session:
        session.append(messages=[{"role": "system", "content": DOCUMENT}])
        session.commit("The handbook of the pump", branch="main")
    for number, question in enumerate(QUESTIONS):
        with repo.session("main") as session:
            session.append(messages=[{"role": "user", "content": question}], add_generation_prompt=True)
            asked = session.commit(question, branch=f"question/{number}")
        with repo.fork(str(asked.commit)[3:19], 2) as kids:
            kids.generate(["", ""], SAMPLING)
            for i, kid in enumerate(kids):
                kid.commit(f"Answer {i}", branch=f"question/{number}/answer/{i}")
    repo.tag("reviewed", "question/0/answer/1")


@contextmanager
def served(repo: Any) -> Iterator[str]:
    """The address of a gateway on a thread."""
    with server.opened(repo, single(KEY), GatewaySettings()) as service, socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        running = server.server(service)
        thread = threading.Thread(target=running.run, args=([listening],), daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        running.should_exit = True
        thread.join()


def shoot(browser: Any, url: str, name: str, steps: Any, **options: Any) -> None:
    context = browser.new_context(**options)
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.goto(url)
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.locator("[role=treeitem]").first.wait_for()
    steps(page)
    page.wait_for_timeout(300)
    (DOCS / name).write_bytes(small(page.screenshot()))
    context.close()
    print(f"wrote docs/{name}, {(DOCS / name).stat().st_size:,} bytes")


def small(png: bytes) -> bytes:
    """A picture of 8-bit RGB as one with a palette: text on a plain ground needs few colours."""
    width, height = struct.unpack(">II", png[16:24])
    rows = unfiltered(zlib.decompress(b"".join(data for kind, data in chunks(png) if kind == b"IDAT")), width, height)
    kept = rows >> (8 - LEVELS) << (8 - LEVELS)
    _, numbers, counts = np.unique(kept.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    numbers = numbers.reshape(-1)
    if len(counts) > 256:
        raise SystemExit(f"{len(counts)} colours: keep fewer LEVELS")
    sums = [np.bincount(numbers, weights=rows[..., channel].reshape(-1)) for channel in range(3)]
    colours = np.rint(np.stack(sums, axis=1) / counts[:, None]).astype(np.uint8)
    plain = np.insert(numbers.reshape(height, width).astype(np.uint8), 0, 0, axis=1)
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = ((b"IHDR", head), (b"PLTE", colours.tobytes()))
    parts += ((b"IDAT", zlib.compress(plain.tobytes(), 9)), (b"IEND", b""))
    return png[:8] + b"".join(chunk(kind, data) for kind, data in parts)


def chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at < len(png):
        (num,) = struct.unpack(">I", png[at : at + 4])
        yield png[at + 4 : at + 8], png[at + 8 : at + 8 + num]
        at += num + 12


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def unfiltered(data: bytes, width: int, height: int) -> Any:
    """The pixels [height, width, 3] of PNG scanlines of RGB, each with the filter that its first byte names."""
    size, out = 3 * width, np.zeros((height + 1, 3 * width + 3), np.int64)
    for y in range(height):
        kind, line = data[y * (size + 1)], np.frombuffer(data, np.uint8, size, y * (size + 1) + 1)
        row, above = out[y + 1], out[y]
        if kind in (0, 2):
            row[3:] = (line + (above[3:] if kind == 2 else 0)) & 255
            continue
        for x in range(3, size + 3):
            left, up, corner = int(row[x - 3]), int(above[x]), int(above[x - 3])
            near = min((left, up, corner), key=lambda one: abs(left + up - corner - one))
            guess = {1: left, 3: (left + up) // 2, 4: near}[kind]
            row[x] = (int(line[x - 3]) + guess) & 255
    return out[1:, 3:].astype(np.uint8).reshape(height, width, 3)


def row(page: Any, text: str) -> Any:
    return page.locator("[role=treeitem] > .row", has_text=text).first.locator("a")


def session(page: Any) -> None:
    row(page, "question/0/answer/1").click()
    page.locator("#detail .completion").wait_for()
    page.locator("#detail .completion").last.scroll_into_view_if_needed()


def forked(page: Any) -> None:
    row(page, "handbook").click()
    page.locator("summary", has_text="Fork").click()
    page.fill("textarea[name=prompt]", "Who may enter the cellar?")
    page.fill("input[name=name]", "cellar")
    page.fill("input[name=max_tokens]", "48")
    page.locator("form[action='/tree/fork'] button").click()
    row(page, "cellar/1").wait_for(timeout=900_000)
    row(page, "cellar/0").click()
    page.locator("#detail h2", has_text="cellar/0").wait_for()
    page.locator("button.compare").click()
    row(page, "cellar/1").click()
    page.locator(".side").nth(1).wait_for()


def main() -> None:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which(os.environ.get("THAW_CHROMIUM", "chromium"))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        model = str(ensure_demo_model(print))
        path = Path(folder) / "pump" / ".thaw"
        path.parent.mkdir()
        with thaw.load_engine("transformers", model=model) as engine, thaw.open(path, engine=engine) as repo:
            make(repo)
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            with served(repo) as url:
                screen = {"viewport": {"width": 1000, "height": 560}}
                shoot(browser, url, "tree-session.png", session, **screen)
                shoot(browser, url, "tree-diff.png", forked, color_scheme="dark", **screen)
                phone = {"viewport": {"width": 390, "height": 560}}
                shoot(browser, url, "tree-phone.png", lambda page: None, **phone)
            browser.close()


if __name__ == "__main__":
    main()
