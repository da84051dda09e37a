"""Laws of the asyncio view: the same results, and a cancelled task stops its work."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from thaw import Sampling, aio
from thaw.engines.base import Engine
from thaw.repo import bridge

WARM = Sampling(max_tokens=12, ignore_eos=True)


def test_awaited_verbs_do_what_the_blocking_ones_do(tmp_path: Path, engine: Engine) -> None:
    async def main() -> None:
        async with await aio.open(tmp_path / "r", engine=engine) as repo, await repo.session(seed=3) as s:
            await s.append("hello " * 50)
            done = await s.commit("read", branch="main")
            out = await s.generate("Why?", WARM)
            back = await repo.session("main")
            stream = back.stream("Why?", WARM)
            text = [delta.text async for delta in stream]
            assert "".join(text) == out.text and (await stream).token_ids == out.token_ids
            async with await repo.fork("main", 3) as kids:
                outs = await kids.generate(["a", "b", "c"], WARM)
                assert len(outs) == len(kids) == 3
                await kids.commit("k")
                await repo.adopt(kids[1], "main")
            assert repo.sync.resolve("main@{1}").commit == done.commit
            inside = await repo.session("k/0:310")
            assert (await inside.resume()).token_ids == outs[0].token_ids
            answer = await back.chat([{"role": "user", "content": "x"}], WARM)
            assert answer.text and (await back.view()).tokens == back.sync.tokens

    asyncio.run(main())


def test_others_run_while_one_waits(tmp_path: Path, slow_engine: Engine) -> None:
    async def main() -> None:
        async with await aio.open(tmp_path / "r", engine=slow_engine) as repo:
            a, b = await repo.session(), await repo.session()
            outs = await asyncio.gather(a.generate("x", WARM).result(), b.generate("y", WARM).result())
            assert all(len(out.token_ids) == 12 for out in outs)

    asyncio.run(main())


def test_cancelling_the_task_cancels_the_generation(tmp_path: Path, slow_engine: Engine) -> None:
    long = Sampling(max_tokens=5000, ignore_eos=True)

    async def main() -> None:
        async with await aio.open(tmp_path / "r", engine=slow_engine) as repo:
            s = await repo.session()
            task = asyncio.ensure_future(s.generate("x", long).result())
            while not (await s.view()).running:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            while (await s.view()).running:
                await asyncio.sleep(0.01)
            assert 0 < s.sync.num_tokens < 1000
            async for _ in s.stream("again", long):
                break
            while (await s.view()).running:
                await asyncio.sleep(0.01)
            assert s.sync.turns[-1].finish_reason == "abort"

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(8))
def test_all_items_of_a_thread_come_in_order_and_then_its_error(seed: int) -> None:
    """Whoever of the two is faster: no item is lost, and nobody waits for one that is there."""

    def made(rng: random.Random, num: int) -> Iterator[int]:
        for i in range(num):
            if rng.random() < 0.1:
                time.sleep(rng.random() / 2000)
            yield i
        raise LookupError("the end")

    async def main() -> None:
        rng = random.Random(seed)
        for _ in range(20):
            found, num = list[int](), rng.randrange(200)
            with pytest.raises(LookupError, match="the end"):
                async for item in bridge.each(made(random.Random(rng.random()), num)):
                    found.append(item)
                    if rng.random() < 0.1:
                        await asyncio.sleep(rng.random() / 2000)
            assert found == list(range(num))

    asyncio.run(asyncio.wait_for(main(), 60))


def test_the_loop_is_woken_once_for_items_that_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    woken, real = list[object](), bridge.wake

    def wake(*what: object) -> bool:
        woken.append(what)
        return real(*what)  # type: ignore[arg-type]

    async def main() -> None:
        found = []
        async for item in bridge.each(iter(range(1000))):
            if not found:
                time.sleep(0.2)  # the loop is busy, and the thread goes on
            found.append(item)
        assert found == list(range(1000))

    monkeypatch.setattr(bridge, "wake", wake)
    asyncio.run(main())
    assert len(woken) < 10
