"""Token ids to text as they come, and stop strings.

A pure function of the token ids: rebuilding it after a restart from the same ids gives the same text.
"""

from __future__ import annotations

from collections.abc import Sequence

from thaw.engines.base import Codec
from thaw.engines.text import window


class TextStream:
    """The text of one completion. Every token costs the same, however long the text is."""

    def __init__(self, codec: Codec, context: Sequence[int], stop: Sequence[str]) -> None:
        """`context`: the session's tokens before the completion. A character that they begin is part of its text."""
        self._window = window(codec, context)
        self._stop = tuple(stop)
        self._hold = max((len(s) for s in self._stop), default=1) - 1
        self._given: list[str] = []
        self._held = ""
        self._fresh = 0

    @property
    def text(self) -> str:
        return "".join(self._given) + self._held

    def push(self, token: int) -> None:
        """Add one token; `text` grows when whole characters are known."""
        news = self._window.push(token)
        self._held += news
        self._fresh = len(news)

    def cut_at_stop(self) -> str | None:
        """The stop string that the last token completed, after cutting the text before it. The earliest wins."""
        if not self._stop:
            return None
        old = len(self._held) - self._fresh
        found = [(self._held.find(s, max(0, old - len(s) + 1)), s) for s in self._stop]
        hits = sorted((at, s) for at, s in found if at >= 0)
        if not hits:
            return None
        self._held = self._held[: hits[0][0]]
        return hits[0][1]

    def news(self, *, final: bool) -> str:
        """Text that was not given yet; what might become a stop string is held back until `final`."""
        end = len(self._held) if final else max(0, len(self._held) - self._hold)
        out, self._held = self._held[:end], self._held[end:]
        self._given.append(out)
        return out
