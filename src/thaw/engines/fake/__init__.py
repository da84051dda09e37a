"""The fake engine: no model, the standard library's hashes, and every law.

The next token's logits are a hash of the KV bytes of the whole prefix, so a wrong byte anywhere shows. KV of a token is
a hash of the token, its position and the KV before it. Tokens are bytes (0–255), 256 starts and 257 ends a text.
"""

from __future__ import annotations

from thaw.engines.base import Engine


def load(
    *,
    model: str = "fake",
    seed: int = 0,
    max_model_len: int = 32768,
    policy: str = "0",
    step_s: float = 0.0,
    groups: str = "one",
    interior: bool = True,
) -> Engine:
    """Boot a fake engine. `seed` are its "weights"; `step_s` slows every forward pass (for tests of concurrency).

    `groups`: which cache groups it has (`shapes.py`): "one", "two" full ones, "hybrid" (full, sliding and a point
    state), "states" (full and a point state), "latent". `interior=False`: as engines do, it keeps windows of a
    session's end alone, and states where sessions, turns and commits end or where they were asked for.
    """
    from thaw.engines.embedded.engine import EmbeddedEngine
    from thaw.engines.fake.backend import FakeBackend
    from thaw.engines.fake.shapes import groups_of

    backend = FakeBackend(model, seed, max_model_len, step_s, groups_of(groups), keeps_interior=interior)
    return EmbeddedEngine(backend, policy=policy)
