"""SGLang's radix cache with thaw's records behind it: `--radix-cache-backend thaw`.

A subclass of SGLang's own tree that overrides what SGLang asks of a cache at a request's borders: a match (load what
the record has and the tree lacks), a checkpoint (publish only what is nobody else's), a release (keep what was
computed). Nodes of the tree are handles and never looked into. For requests without thaw's message everything is
SGLang's own.
"""

from __future__ import annotations

from array import array
from functools import partial
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from thaw.engines.served.guard import guarded, unheard
from thaw.engines.sglang.scheduler.records import RankRecord, RankRequest
from thaw.engines.sglang.scheduler.scheduler import RankSide


class ThawRadixCache(UnifiedRadixCache):
    side: RankSide
    admitting: bool = False
    """Set while SGLang asks for the match by which it admits a request; other matches only look."""

    def bind(self, side: RankSide) -> None:
        self.side = side
        side.row, side.free_tail = self._row, self.token_to_kv_pool_allocator.free
        side.pins.lock, side.pins.unlock, side.room = self._pin, self.unlock, self._room

    # -- what SGLang asks

    def match_prefix(self, params: MatchPrefixParams) -> Any:
        run = self._run(params.req)
        if run is None or not self.admitting:
            return super().match_prefix(params)
        match = guarded(partial(self._match_own, params, run), partial(self.side.stop, run))
        return super().match_prefix(_limited(params, 0)) if match is None else match

    def prefix_device_indices(self, req: Any) -> torch.Tensor:
        run = self._run(req)
        if run is None or run.tail is None or req.prefix_len <= run.tail_at:
            found: torch.Tensor = super().prefix_device_indices(req)
            return found
        path = self.path_device_indices(req.last_node)[: run.tail_at]
        tail, run.tail = run.tail, None  # SGLang's from here on, as part of the request
        return torch.cat([path, tail])[: req.prefix_len]

    def checkpoint(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        run = self._run(req)
        if run is not None and not guarded(partial(self._may_publish, run, req, up_to), partial(self.side.stop, run)):
            return
        super().checkpoint(req, up_to=up_to, **kwargs)

    def claim_kv_row(self, req: Any) -> bool:
        run = self._run(req)
        if run is not None:
            released = partial(self.side.released, run, retracted=not req.finished())
            guarded(released, partial(self.side.stop, run))
        claimed: bool = super().claim_kv_row(req)
        return claimed

    def on_release(self, req: Any, *, checkpointed: bool) -> None:
        super().on_release(req, checkpointed=checkpointed)
        if self._run(req) is not None and req.finished():
            num_tokens = len(req.origin_input_ids) + len(req.output_ids)
            guarded(partial(self.side.end, req.rid, num_tokens=num_tokens), unheard)

    def release_aborted_request(self, handle: Any) -> None:
        super().release_aborted_request(handle)
        if hasattr(self, "side"):
            guarded(partial(self.side.end, handle.rid), unheard)

    def reset(self) -> None:
        super().reset()
        if hasattr(self, "side"):
            self.side.flushed()

    # -- for a request of thaw's

    def _run(self, req: Any) -> RankRequest | None:
        if req is None or not hasattr(self, "side"):
            return None
        run = self.side.runs.get(req.rid)
        if run is not None:
            run.req = req
        return run

    def _match_own(self, params: MatchPrefixParams, run: RankRequest) -> Any:
        """None: its KV may not be used any more."""
        record = self.side.record_of(run)
        return None if record is None else self._admitted(params, run, record)

    def _may_publish(self, run: RankRequest, req: Any, up_to: int) -> bool:
        self.side.number(run, up_to)
        return not self._is_anothers(req, up_to)

    def _admitted(self, params: MatchPrefixParams, run: RankRequest, record: RankRecord) -> Any:
        """The match of exactly what the record has: the tree's where it holds the record's own bits, loaded where it
        lacks them, and in slots of the request's own where it has another's. Where there is no room the match is what
        is there, and SGLang does not admit the request."""
        want = min(run.want, len(params.key))
        aligned = want // self.page_size * self.page_size
        limited = _limited(params, aligned)
        match = super().match_prefix(limited)
        slots = self._slots(match)
        own = self.side.contents.own_length(slots, record.chain) // self.page_size * self.page_size
        if 0 < own < len(slots):
            aligned = own
            match = super().match_prefix(_limited(params, own))
            slots = self._slots(match)
        elif own < len(slots):
            params.req.extra_key = _own_salt(run)
            limited = _limited(_salted(params), aligned)
            match = super().match_prefix(limited)
            slots = self._slots(match)
        if run.tail is not None and run.tail_at != aligned:
            self.side.drop_tail(run)
        if len(slots) < aligned:
            match = self._loaded(limited, match, slots, run, record, aligned)
        if match.device_prefix_len == aligned < want and run.error is None:
            match = self._with_tail(match, run, record, aligned, want)
        if run.error is not None:
            return super().match_prefix(_limited(params, 0))
        run.numbered = match.device_prefix_len
        return match

    def _slots(self, match: Any) -> torch.Tensor:
        path: torch.Tensor = self.path_device_indices(match.last_device_node)
        return path[: match.device_prefix_len]

    def _loaded(
        self, params: MatchPrefixParams, match: Any, slots: torch.Tensor, run: RankRequest, record: RankRecord,
        stop: int,
    ) -> Any:  # fmt: skip
        """Load [len(slots), stop) and insert it when it is there on all ranks; the new match, or `match` where there is
        no room or it could not be loaded."""
        start = len(slots)
        lock = self.lock(match.last_device_node)
        try:
            fresh = self._allocate(stop - start)
            if fresh is None:
                return match
            if not self.side.load(run, record, start, stop, fresh):
                self.token_to_kv_pool_allocator.free(fresh)
                return match
            self.insert(InsertParams(key=params.key[:stop], value=torch.cat([slots, fresh]), prev_prefix_len=start))
        finally:
            self.unlock(lock)
        return super().match_prefix(params)

    def _with_tail(self, match: Any, run: RankRequest, record: RankRecord, start: int, stop: int) -> Any:
        """What is not in the tree, in pages of the request's own."""
        if run.tail is None:
            lock = self.lock(match.last_device_node)
            try:
                pages = self._allocate(-(-(stop - start) // self.page_size) * self.page_size)
            finally:
                self.unlock(lock)
            if pages is None:
                return match
            if not self.side.load(run, record, start, stop, pages[: stop - start]):
                self.token_to_kv_pool_allocator.free(pages)
                return match
            run.tail, run.tail_at = pages, start
        return match._replace(device_prefix_len=stop, cache_protected_len=start)

    def _allocate(self, count: int) -> torch.Tensor | None:
        """Slots, after eviction of what nobody holds; None when there is no room."""
        allocator = self.token_to_kv_pool_allocator
        missing = count - allocator.available_size()
        if missing > 0:
            self.evict(EvictParams(num_tokens=missing))
        found = allocator.alloc(count)
        return None if found is None else found.to(torch.int64)

    def _is_anothers(self, req: Any, up_to: int) -> bool:
        """Whether the tree has other bits for these tokens: SGLang would exchange the request's own for them."""
        key = RadixKey(req.full_untruncated_fill_ids[:up_to], req.extra_key, cache_salt=req.cache_salt)
        match = super().match_prefix(MatchPrefixParams(key=key.page_aligned(self.page_size)))
        there = self._slots(match)
        return not torch.equal(there.cpu(), self._row(req, len(there)).cpu())

    def _row(self, req: Any, upto: int) -> torch.Tensor:
        row: torch.Tensor = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :upto]
        return row.to(torch.int64)

    # -- pins and counts

    def _pin(self, record: RankRecord) -> tuple[Any, int]:
        """Hold what of the record lies in the tree. (the lock, how many tokens)"""
        if record.salt is None:
            return None, 0
        params = MatchPrefixParams(key=RadixKey(array("q", record.tokens[: record.num_kv]), record.salt or None))
        there = self.side.contents.own_length(self._slots(super().match_prefix(params)), record.chain)
        aligned = there // self.page_size * self.page_size
        match = super().match_prefix(_limited(params, aligned))
        return self.lock(match.last_device_node), match.device_prefix_len

    def _room(self) -> dict[str, int]:
        return {
            "tokens": int(self.token_to_kv_pool_allocator.size),
            "free_tokens": self.token_to_kv_pool_allocator.available_size(),
            "evictable_tokens": self.evictable_size(),
            "protected_tokens": self.protected_size(),
        }


def _limited(params: MatchPrefixParams, limit: int) -> MatchPrefixParams:
    """The same match of at most `limit` tokens."""
    key = params.key
    short = RadixKey(key.token_ids, key.extra_key, key.is_bigram, limit, key.cache_salt)
    return MatchPrefixParams(key=short, cow_mamba=params.cow_mamba, req=params.req)


def _salted(params: MatchPrefixParams) -> MatchPrefixParams:
    """The same match under the request's salt as it is now."""
    key = params.key
    other = RadixKey(key.token_ids, params.req.extra_key, key.is_bigram, key.limit, key.cache_salt)
    return MatchPrefixParams(key=other, cow_mamba=params.cow_mamba, req=params.req)


def _own_salt(run: RankRequest) -> str:
    """A salt that no other request has, and that is the same on all ranks."""
    return f"thaw-own:{run.message.id}:{run.retracted}"
