"""Queues, snapshots and restores, awaited."""

from __future__ import annotations

import asyncio
from pathlib import Path

import thaw
from thaw import Sampling, aio
from thaw.engines.base import Engine
from thaw.snapshot.aio import AsyncRequestQueue

LONG = Sampling(max_tokens=60, ignore_eos=True)


def test_an_engine_is_snapshotted_drained_and_restored_from_a_loop(
    tmp_path: Path, slow_engine: Engine, engine: Engine
) -> None:
    async def main() -> None:
        repo = await aio.open(tmp_path / "r", engine=slow_engine)
        queue = await aio.request_queue(repo, max_num_seqs=2)
        session = await repo.session(seed=1)
        request = await queue.submit(session, "The river. ", LONG, id="r0")
        async for piece in request.stream():
            if piece.offset > 5:
                break
        found = await aio.snapshot(repo, "engine", queue=queue)
        assert len(found.of("running")) == 1
        async with await aio.checkpoint_ring(queue, tokens=None, seconds=1000.0) as ring:
            assert (await ring.checkpoint()).sessions
        assert (await queue.drain()).complete and await queue.undrain()
        assert await queue.wait(60)
        whole = await request.result()
        there = await aio.open(tmp_path / "r", engine=engine)
        for back in (await aio.restore(there, "engine"), await aio.restore_checkpoint(there)):
            async with AsyncRequestQueue(back.queue) as again:
                assert await again.request("r0").result(60) == whole
        await queue.close()
        other = await aio.request_queue(there)
        (moved,) = await aio.migrate(queue, other, [session])
        assert moved.session.tokens == tuple(moved.session.tokens)
        await other.close()

    asyncio.run(main())


def test_the_awaited_names_stand_for_the_blocking_ones() -> None:
    for name in ("snapshot", "restore", "restore_checkpoint", "migrate"):
        assert asyncio.iscoroutinefunction(getattr(aio, name)) and callable(getattr(thaw.snapshot, name))
