"""The pool for asyncio is the same pool."""

from __future__ import annotations

import asyncio

import pytest

import thaw
from thaw import Sampling
from thaw.core.errors import Cancelled

GREEDY = Sampling(max_tokens=8, ignore_eos=True)


def test_awaiting_gives_what_waiting_gives() -> None:
    async def main() -> None:
        async with await thaw.aio.pool("fake", backend="inline") as pool:
            ids = pool.sync.encode("a document " * 10)
            there = await pool.fork(ids, 3, GREEDY, seed=4)
            here = await asyncio.to_thread(pool.sync.fork, ids, 3, GREEDY, seed=4)
            assert [r.token_ids for r in there] == [r.token_ids for r in here]
            async with pool.submit(ids, 3, GREEDY, seed=4) as round_:
                deltas = [delta async for delta in round_]
                ended = [result async for result in round_.as_completed()]
            assert sorted(result.index for result in ended) == [0, 1, 2]
            assert sum(len(delta.token_ids) for delta in deltas) == 24

    asyncio.run(main())


def test_a_cancelled_task_cancels_its_round() -> None:
    async def main() -> None:
        async with await thaw.aio.pool("fake", backend="inline", step_s=0.01) as pool:
            ids = pool.sync.encode("a document " * 10)
            round_ = pool.submit(ids, 2, Sampling(max_tokens=20_000, ignore_eos=True))
            begun = await round_.sync()
            task = asyncio.ensure_future(round_.result())
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            results = await asyncio.to_thread(begun.result, 20, errors="return")
            assert all(isinstance(result.error, Cancelled) for result in results)

    asyncio.run(main())
