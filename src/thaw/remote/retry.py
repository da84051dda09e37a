"""How often and how long a request is tried again: a bounded number of times, with waits that spread callers apart."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

ATTEMPTS = 7
"""Of one request, the first one counted."""
PATIENCE = 3
"""Time-outs of one request that a call may take until it gives up, its tries and waits together."""
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0


def attempts(number: int = ATTEMPTS, *, deadline_s: float) -> Iterator[int]:
    """0, 1, … with a wait before each but the first: a random part of a time that doubles ("full jitter"). Ends after
    `number`, or once the next wait would pass `deadline_s` seconds from the first."""
    until = time.monotonic() + deadline_s
    for attempt in range(number):
        if attempt:
            wait = random.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt))
            if time.monotonic() + wait > until:
                return
            time.sleep(wait)
        yield attempt
