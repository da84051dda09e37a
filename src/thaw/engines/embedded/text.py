"""Token ids to text as they come, and stop strings.

A pure function of the token ids: rebuilding it after a restart from the same ids gives the same text. Text is decoded
in a small moving window (a token may be a piece of a character, and a decoder may add or drop a leading space), as
vLLM's incremental detokenizer does.
"""

from __future__ import annotations

from collections.abc import Sequence

from thaw.engines.base import Codec

CONTEXT = 5
"""Prompt tokens decoded along as context of the first output tokens."""


class TextStream:
    def __init__(self, codec: Codec, context: Sequence[int], stop: Sequence[str]) -> None:
        self._codec = codec
        self._ids = list(context[-CONTEXT:])
        self._prefix, self._read = 0, len(self._ids)
        self._stop = tuple(stop)
        self._hold = max((len(s) for s in self._stop), default=1) - 1
        self.text = ""
        self._sent = 0

    def push(self, token: int) -> None:
        """Add one token; `text` grows when whole characters are known."""
        self._ids.append(token)
        before = self._codec.decode(self._ids[self._prefix : self._read])
        after = self._codec.decode(self._ids[self._prefix :])
        if len(after) > len(before) and not after.endswith("�"):
            self.text += after[len(before) :]
            self._prefix, self._read = self._read, len(self._ids)

    def flush(self) -> None:
        """The end: also give what is not a whole character yet."""
        before = self._codec.decode(self._ids[self._prefix : self._read])
        self.text += self._codec.decode(self._ids[self._prefix :])[len(before) :]
        self._prefix = self._read = len(self._ids)

    def cut_at_stop(self, start: int) -> str | None:
        """The stop string that appeared in `text` since length `start`, after cutting the text before it."""
        found = [(self.text.find(s, max(0, start - len(s) + 1)), s) for s in self._stop]
        hits = sorted((at, s) for at, s in found if at >= 0)
        if not hits:
            return None
        self.text = self.text[: hits[0][0]]
        return hits[0][1]

    def news(self, *, final: bool) -> str:
        """Text that was not given yet; what might become a stop string is held back until `final`."""
        end = len(self.text) if final else max(self._sent, len(self.text) - self._hold)
        out, self._sent = self.text[self._sent : end], end
        return out
