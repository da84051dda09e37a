"""The fake engine: no model, the standard library's hashes, and every law.

The next token's logits are a hash of the KV bytes of the whole prefix, so a wrong byte anywhere shows. KV of a token is
a hash of the token, its position and the KV before it. Tokens are bytes (0–255), 256 starts and 257 ends a text.
"""

from __future__ import annotations

from thaw.engines.base import Engine


def load(
    *, model: str = "fake", seed: int = 0, max_model_len: int = 32768, policy: str = "0", step_s: float = 0.0
) -> Engine:
    """Boot a fake engine. `seed` are its "weights"; `step_s` slows every forward pass (for tests of concurrency)."""
    from thaw.engines.embedded.engine import EmbeddedEngine
    from thaw.engines.fake.backend import FakeBackend

    return EmbeddedEngine(FakeBackend(model, seed, max_model_len, step_s), policy=policy)
