"""The chained hash of a token prefix, which `match` looks up, and the common prefix of two sequences (`thaw diff`).

The sequence is cut in windows of 256 tokens. chain(0) = BLAKE3("thaw.prefix/1" NUL model-id);
chain(k+1) = BLAKE3(chain(k) ‖ tokens of window k, each a little-endian u32). The hash of a prefix that ends inside
window k is BLAKE3(chain(k) ‖ the tokens of that window so far). The model's object id is in the root, so prefixes of
different models, tokenizers or policies never meet. In a namespace chain(0) = BLAKE3("thaw.prefix/2" NUL model-id NUL
namespace), so those of different namespaces never meet either. KV that other weights computed than the state's model
has a root that nobody looks up: chain(0) = BLAKE3("thaw.prefix/3" NUL namespace NUL salt) of its lineage.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise

from thaw.core.ids import digest

WINDOW = 256
"""Tokens in a window; a segment never crosses a multiple of it."""


def root(model_id: str, namespace: str = "") -> str:
    if namespace:
        return digest(b"thaw.prefix/2\0" + model_id.encode() + b"\0" + namespace.encode())
    return digest(b"thaw.prefix/1\0" + model_id.encode())


def stale_root(salt: str, namespace: str = "") -> str:
    """Of a lineage's states with KV of other weights."""
    return digest(b"thaw.prefix/3\0" + namespace.encode() + b"\0" + salt.encode())


def extend(chain: str, tokens: Sequence[int]) -> str:
    """The hash of the prefix `chain` with `tokens` (at most a window of them) after it."""
    return digest(chain.encode() + struct.pack(f"<{len(tokens)}I", *tokens))


def chains(model_id: str, tokens: Sequence[int], namespace: str = "") -> list[str]:
    """chain(0) … chain(len(tokens) // 256): the hashes of every whole-window prefix."""
    out = [root(model_id, namespace)]
    for start in range(0, len(tokens) - WINDOW + 1, WINDOW):
        out.append(extend(out[-1], tokens[start : start + WINDOW]))
    return out


def windows(start: int, end: int) -> list[tuple[int, int]]:
    """[start, end) cut at multiples of 256, as half-open pairs."""
    cuts = [start, *range((start // WINDOW + 1) * WINDOW, end, WINDOW), end]
    return [(a, b) for a, b in pairwise(cuts) if a < b]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens are equal, by halves: long sequences are compared in C, not token by token."""
    if type(a) is not type(b):
        a, b = tuple(a), tuple(b)
    same, end = 0, min(len(a), len(b))
    if a[:end] == b[:end]:
        return end
    while end - same > 1:
        middle = (same + end) // 2
        if a[same:middle] == b[same:middle]:
            same = middle
        else:
            end = middle
    return same
