"""A request of thaw's that vLLM runs, as the scheduler's side knows it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from thaw.core.errors import ThawError
from thaw.engines.served import protocol


@dataclass
class Running:
    """`want`: tokens that are to come from the record.

    `computed`: tokens that have KV in its blocks once all steps so far are done. `preempted`: how often its KV was
    saved when vLLM took its blocks away. `found`: (local, loaded) tokens when it first got blocks. `given`: tokens that
    it had from vLLM's cache and from thaw when it last got blocks. `salted`: its blocks are its lineage's alone.
    `replayed`: its grammar knows what the completion has already."""

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


def give_own_salt(request: Any) -> None:
    """Before it is scheduled: a salt that no other request has, so that nothing is found under it."""
    request.cache_salt = f"thaw-own:{secrets.token_hex(16)}"
    request.block_hashes.clear()
    request.update_block_hashes()


def is_aborted(request: Any) -> bool:
    return str(request.status).endswith("FINISHED_ABORTED")


def is_failed(request: Any) -> bool:
    return str(request.status).endswith("FINISHED_ERROR")
