"""Which weights run: the identity, and noticing that they changed.

The identity is hashed when first asked for. A quick sample of every weight is compared at each capture, hydrate and
use; when it differs, the epoch moves on, the identity is hashed again, and sessions of an older epoch are stale: their
KV was computed by weights that are gone.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import msgspec

from thaw.core.identity import ModelIdentity
from thaw.engines.embedded.backend import Backend


class Weights(NamedTuple):
    """What computes KV: a policy's version, and the epoch of the weights in this engine."""

    policy: str
    epoch: int


class WeightsWatch:
    def __init__(self, backend: Backend, policy: str) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._sample = backend.weights_sample()
        self._identity: ModelIdentity | None = None
        self._known: dict[int, str] = {}
        self._running = Weights(policy, 0)

    @property
    def running(self) -> Weights:
        """As of the last look; read without waiting for one."""
        return self._running

    @property
    def policy(self) -> str:
        return self._running.policy

    @property
    def epoch(self) -> int:
        return self._running.epoch

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
                self._known[self.epoch] = self._identity.weights
            return msgspec.structs.replace(self._identity, policy=self.policy), self.epoch

    def weights_of(self, epoch: int) -> str | None:
        """The id of the weights of an epoch; None where nobody asked for it while they ran."""
        return self._known.get(epoch)

    def set_policy(self, version: str) -> None:
        with self._lock:
            self._running = Weights(version, self.epoch)
            self._look()

    def _look(self) -> None:
        sample = self._backend.weights_sample()
        if sample != self._sample:
            self._sample, self._identity = sample, None
            self._running = Weights(self.policy, self.epoch + 1)
