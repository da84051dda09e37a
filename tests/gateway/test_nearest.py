"""Which open session a request goes on from: the one with most of its tokens, whatever is passed over at one look."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

import thaw

for package in ("starlette", "uvicorn"):
    pytest.importorskip(package, reason="the extra [server] is not installed")

from thaw.gateway.engines import ServingEngine  # noqa: E402
from thaw.gateway.live import LiveEntry, LiveSessions  # noqa: E402
from thaw.gateway.settings import Limits  # noqa: E402
from thaw.repo.aio import AsyncRepository  # noqa: E402


def tokens(rng: random.Random) -> tuple[int, ...]:
    """Few kinds, so that many begin alike."""
    return tuple(rng.randrange(2) for _ in range(rng.randrange(1, 9)))


def best(entries: list[LiveEntry], wanted: tuple[int, ...]) -> tuple[int, LiveEntry | None]:
    """Of all, looked at one by one: most tokens, then the shortest, then the first."""
    found: tuple[int, LiveEntry | None] = (0, None)
    for entry in entries:
        num, held = entry.common(wanted), found[1]
        equal = num == found[0] and (held is None or len(entry.tokens) < len(held.tokens))
        if num and (num > found[0] or equal):
            found = num, entry
    return found


@pytest.mark.parametrize("seed", range(40))
def test_the_nearest_is_that_of_all(tmp_path: Path, seed: int) -> None:
    """Also where an answer is told in other tokens than were sampled."""

    async def main(home: ServingEngine) -> None:
        rng = random.Random(seed)
        live = LiveSessions(Limits())
        for _ in range(rng.randrange(20)):
            entry = live.begin(home, "", tokens(rng), chat=True)
            if rng.random() < 0.5:
                start = rng.randrange(len(entry.tokens))
                entry.answers, entry.told = ((start, len(entry.tokens)),), (*entry.tokens[:start], *tokens(rng))
            if rng.random() < 0.7:
                entry.ready.set()
        entries = live.of(home)
        mine = live.begin(home, "", tokens(rng), chat=True)
        ready, coming = live.nearest(mine, set())
        assert ready[0] == best([one for one in entries if one.usable], mine.tokens)[0]
        assert coming[0] == best([one for one in entries if not one.usable], mine.tokens)[0]
        for found, some in ((ready, True), (coming, False)):
            if found[0]:
                assert found == best([one for one in entries if one.usable is some], mine.tokens)

    with thaw.load_engine("fake") as engine, thaw.open(tmp_path / "runs", engine=engine, create=True) as repo:
        asyncio.run(main(ServingEngine(0, AsyncRepository(repo), None, own=False)))
