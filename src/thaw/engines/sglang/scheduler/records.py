"""What an engine's rank knows of each session, and of each request that continues from one. No SGLang here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from thaw.core.errors import ThawError
from thaw.engines.served import protocol
from thaw.engines.served.budget import GUEST, Caller
from thaw.engines.served.worker.host_cache import HostRecord, Piece
from thaw.engines.sglang.scheduler.sampler import Chosen


@dataclass
class RankRecord:
    """`tokens[:num_kv]` have KV in the arena (`kept`). `chain` [num_kv], int64: the number of each token's content, by
    which the slots of SGLang's pool that hold the same bits are known. `salt`: under which SGLang's tree may have them;
    None until a request has run. `caller`: whose it is."""

    tokens: list[int]
    kept: HostRecord
    chain: torch.Tensor
    live: RankRequest | None = None
    salt: str | None = None
    touched: float = 0.0
    caller: Caller = GUEST

    @property
    def num_kv(self) -> int:
        return len(self.chain)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return self.kept.pieces


@dataclass
class RankRequest:
    """A request of thaw's. `want` tokens are to come from its record; `numbered` tokens of its row have numbers.

    `tail`: pages of the pool that hold what of the record is not in the tree, from token `tail_at` on: what ends inside
    a page, or what lies behind another session's tokens; until SGLang takes them over with the request."""

    rid: str
    message: protocol.Run
    want: int
    num_prompt: int
    chosen: Chosen
    req: Any = None
    numbered: int = 0
    tail: torch.Tensor | None = None
    tail_at: int = 0
    retracted: int = 0
    error: ThawError | None = None

    def tokens(self) -> list[int]:
        """Of the request as SGLang has it, the sampled ones included."""
        return [*self.req.origin_input_ids, *self.req.output_ids]

    def num_computed(self) -> int:
        """How many have KV once the steps launched so far are done; never the last one, which runs again."""
        req = self.req
        if req is None or not req.kv.holds_kv:
            return 0
        return max(0, min(int(req.kv.kv_committed_len), len(req.origin_input_ids) + len(req.output_ids) - 1))
