"""Progress on stderr for whatever takes more than two seconds.

On a terminal one line is drawn over and over and wiped at the end. Elsewhere a line is written once the work has taken
two seconds, every half a minute from then on, and when it ends; quick work leaves no trace. A thread draws, so the work
itself is never slowed down; it may call `say` from any thread.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from thaw.cli import output, words

SOON_S, EVERY_S = 0.3, 0.1
PLAIN_AFTER_S, PLAIN_EVERY_S = 2.0, 30.0
FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Progress:
    """`with Progress("reading", how_far): …`; `how_far` may return a detail such as "1,024 of 3,412 tokens"."""

    def __init__(self, what: str, how_far: Callable[[], str] | None = None, *, margin: str = "") -> None:
        self._what = what
        self._margin = margin
        self._how_far = how_far
        self._detail = ""
        self._stop = threading.Event()
        self._started = time.perf_counter()
        self._said = False
        self._drawn = False
        self._thread = threading.Thread(target=self._draw, name="thaw-progress", daemon=True)

    def say(self, what: str) -> None:
        """The work has come to another step."""
        self._what, self._detail = what, ""

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._started

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
        if self._said and kind is None:
            output.note(f"{self._margin}· {self._what}: {words.seconds(self.elapsed_s)}")

    def _draw(self) -> None:
        terminal = output.is_terminal(sys.stderr)
        if self._stop.wait(SOON_S if terminal else PLAIN_AFTER_S):
            return
        if terminal:
            self._frames()
        else:
            self._lines()

    def _lines(self) -> None:
        self._said = True
        output.note(f"{self._margin}· {self._what} …")
        while not self._stop.wait(PLAIN_EVERY_S):
            detail = f" {self._how_far()}" if self._how_far is not None else ""
            output.note(f"{self._margin}· {self._what}{detail} … {words.seconds(self.elapsed_s)}")

    def _frames(self) -> None:
        step = 0
        while not self._stop.wait(EVERY_S):
            self._frame(step)
            step += 1

    def _frame(self, step: int) -> None:
        if self._how_far is not None and step % 5 == 0:
            self._detail = self._how_far()
        mark = FRAMES[step % len(FRAMES)] if output.has_unicode(sys.stderr) else "|/-\\"[step % 4]
        text = f"{self._margin}{mark} {self._what} {self._detail}".rstrip() + f"  {self.elapsed_s:.0f} s"
        sys.stderr.write(f"\r\x1b[K{text[: output.width() - 1]}")
        sys.stderr.flush()
        self._drawn = True
