"""Which weights run: the identity, and noticing that they changed.

The identity is hashed when first asked for. A quick sample of every weight is compared at each capture, hydrate and
use; when it differs, the epoch moves on, the identity is hashed again, and sessions of an older epoch are stale: their
KV was computed by weights that are gone.
"""

from __future__ import annotations

import threading

import msgspec

from thaw.core.identity import ModelIdentity
from thaw.engines.embedded.backend import Backend


class WeightsWatch:
    def __init__(self, backend: Backend, policy: str) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._sample = backend.weights_sample()
        self._identity: ModelIdentity | None = None
        self.policy = policy
        self.epoch = 0

    def check(self) -> None:
        """Look at the weights; if they changed, start a new epoch."""
        with self._lock:
            self._look()

    def identity(self) -> ModelIdentity:
        """The identity of what runs now, under the current policy version."""
        return self.stamp()[0]

    def stamp(self) -> tuple[ModelIdentity, int]:
        """The identity and the epoch it is of, taken together."""
        with self._lock:
            self._look()
            if self._identity is None:
                self._identity = self._backend.identity()
            return msgspec.structs.replace(self._identity, policy=self.policy), self.epoch

    def set_policy(self, version: str) -> None:
        with self._lock:
            self.policy = version
            self._look()

    def _look(self) -> None:
        sample = self._backend.weights_sample()
        if sample != self._sample:
            self._sample, self._identity = sample, None
            self.epoch += 1
