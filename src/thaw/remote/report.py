"""What a transfer did."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from thaw.remote.layout import Kind

Outcome: TypeAlias = Literal["new", "moved", "forced", "deleted", "up-to-date", "kept", "ahead", "left-out"]


class RefMoved(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one branch or tag, here (fetch, pull: `origin/main`) or there (push). `old` and `new`: where it
    stood and stands, None where it is not.

    "kept": a local tag or branch of that name stands elsewhere and was left alone. "ahead": the local branch has what
    the remote has, and more. "left-out": the name has no place here, and nothing came (`tracking.has_place`).
    """

    kind: Kind
    name: str
    outcome: Outcome
    old: str | None
    new: str | None


class TransferReport(msgspec.Struct, frozen=True, kw_only=True):
    """`nbytes`: of packs that were moved, with their headers. `blob_nbytes`: of KV in them. `num_skipped_packs`: packs
    that an earlier, interrupted push had sent."""

    remote: str
    url: str
    refs: tuple[RefMoved, ...]
    num_commits: int = 0
    num_packs: int = 0
    num_skipped_packs: int = 0
    nbytes: int = 0
    blob_nbytes: int = 0
    seconds: float = 0.0


class RemoteGcReport(msgspec.Struct, frozen=True, kw_only=True):
    """`phase`: what the remote's gc waits for now. `seconds_to_wait`: before what was condemned may be deleted."""

    remote: str
    phase: Literal["waiting", "sweeping", "done"]
    epoch: int
    num_live: int
    num_condemned: int
    condemned_nbytes: int
    num_deleted: int
    deleted_nbytes: int
    num_reflog_deleted: int
    seconds_to_wait: float
    dry_run: bool = False
