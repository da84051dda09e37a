"""What SGLang counts of its own pool."""

from __future__ import annotations

from thaw.engines.served.client.engine import ServedEngine


def check_nothing_leaks(engine: ServedEngine) -> None:
    """SGLang's own sum, which every rank makes for itself when it is idle (and ends the engine where it fails)."""
    stats = engine.stats()
    found = stats["free_tokens"] + stats["evictable_tokens"] + stats["protected_tokens"]
    assert (found, stats["protected_tokens"], stats["running"]) == (stats["tokens"], 0, 0)
