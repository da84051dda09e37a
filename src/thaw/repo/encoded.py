"""Rendered conversations as tokens, the last ones.

Who looks for a conversation's prefix encodes its text, and so does the chat that then goes on from there: the second
time the tokens are known. In memory alone, and bounded. A namespace knows its own texts alone, so that the time that
encoding takes says nothing of what others said.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thaw.engines.base import Codec

MAX_CHARACTERS = 1 << 20
"""Of all texts that are remembered, each with `ENTRY` more for what it costs beside them."""
ENTRY = 1024


class EncodedTexts:
    """Of one codec. Safe from any thread."""

    def __init__(self, max_characters: int = MAX_CHARACTERS) -> None:
        self._max = max_characters
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str], tuple[int, ...]] = OrderedDict()
        self._num_characters = 0

    def encode(self, codec: Codec, namespace: str, text: str) -> tuple[int, ...]:
        """As `codec.encode_chat`."""
        key = namespace, text
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                self._known.move_to_end(key)
                return known
        ids = tuple(codec.encode_chat(text))
        with self._lock:
            self._keep(key, ids)
        return ids

    def _keep(self, key: tuple[str, str], ids: tuple[int, ...]) -> None:
        if key in self._known or len(key[1]) + ENTRY > self._max:
            return
        self._known[key] = ids
        self._num_characters += len(key[1]) + ENTRY
        while self._num_characters > self._max:
            (_, oldest), _ = self._known.popitem(last=False)
            self._num_characters -= len(oldest) + ENTRY
