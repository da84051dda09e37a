"""A request of thaw's that vLLM runs, as the scheduler's side knows it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from thaw.core.errors import ThawError
from thaw.engines.served import protocol

NO_HASH_NBYTES = 32


@dataclass
class RunningRequest:
    """`want`: tokens that are to come from the record.

    `computed`: tokens that have KV in its blocks once all steps so far are done. `preempted`: how often its KV was
    saved when vLLM took its blocks away. `found`: (local, loaded) tokens when it first got blocks. `given`: tokens that
    it had from vLLM's cache and from thaw when it last got blocks. `salted`: its blocks are its lineage's alone.
    `replayed`: its grammar knows what the completion has already. `hidden`: hashes of its last blocks, in order, that
    vLLM must not find yet. `stands_in`: others stand in their place, which it finds nowhere."""

    request: Any
    message: protocol.Run
    want: int
    local: int = 0
    found: tuple[int, int] | None = None
    given: int = 0
    computed: int = 0
    preempted: int = 0
    error: ThawError | None = None
    replayed: bool = False
    salted: bool = False
    background: bool = False
    loading: int | None = None
    hidden: list[Any] = field(default_factory=list)
    stands_in: bool = False

    def hide(self, first: int) -> None:
        """vLLM finds no block from number `first` on, until `show`. Only while it is not scheduled."""
        hashes = self.request.block_hashes
        self.hidden, hashes[first:] = hashes[first:], []

    def stand_in(self, first: int) -> None:
        """As `hide`, for a lookup that counts on a hash for each block: that of states does."""
        self.hide(first)
        self.request.block_hashes.extend(secrets.token_bytes(NO_HASH_NBYTES) for _ in self.hidden)
        self.stands_in = True

    def show(self) -> None:
        hashes = self.request.block_hashes
        if self.stands_in:
            del hashes[len(hashes) - len(self.hidden) :]
        hashes.extend(self.hidden)
        self.forget_hidden()

    def forget_hidden(self) -> None:
        """The request has got other hashes meanwhile."""
        self.hidden, self.stands_in = [], False


def give_own_salt(request: Any) -> None:
    """Before it is scheduled: a salt that no other request has, so that nothing is found under it."""
    request.cache_salt = f"thaw-own:{secrets.token_hex(16)}"
    request.block_hashes.clear()
    request.update_block_hashes()


def is_aborted(request: Any) -> bool:
    return str(request.status).endswith("FINISHED_ABORTED")


def is_failed(request: Any) -> bool:
    return str(request.status).endswith("FINISHED_ERROR")
