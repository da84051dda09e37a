"""An `AsyncLLM` that the user's own asyncio program made and uses: thaw's verbs beside its requests, on its loop."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import thaw
import thaw.aio
from thaw.core.errors import InvalidRequest
from thaw.engines.served.settings import settled
from thaw.engines.vllm.settings import VllmSettings, engine_args
from thaw.testing.laws.kit import greedy, ids, same

pytest.importorskip("vllm")
PROMPT = ids(300, 5)


def test_verbs_beside_the_programs_own_requests(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    asyncio.run(program(tiny_model("llama", dtype="bfloat16", head_dim=64), tmp_path))


async def program(model: Path, folder: Path) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    options = engine_args(settled(VllmSettings()))
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(str(model), enforce_eager=True, max_model_len=2048, **options))
    try:
        await beside(llm, folder)
    finally:
        await asyncio.to_thread(llm.shutdown)


async def beside(llm: Any, folder: Path) -> None:
    before = await own(llm)
    with pytest.raises(InvalidRequest, match="api_key"):
        await asyncio.to_thread(thaw.attach, llm, api_key="x")
    engine = await asyncio.to_thread(thaw.attach, llm)
    repo = await thaw.aio.init(folder / "repo", engine=engine)
    session = await repo.session(seed=3)
    await session.append(token_ids=PROMPT)
    one, two = await asyncio.gather(session.generate(sampling=greedy(12)), own(llm))
    assert list(one.token_ids) == two == before
    await session.commit("asked", branch="main")
    back = await repo.session("main")
    same(await session.generate(sampling=greedy(8)), await back.generate(sampling=greedy(8)))
    assert await own(llm) == before
    await asyncio.to_thread(engine.close)
    assert await own(llm) == before


async def own(llm: Any) -> list[int]:
    """What the program asks vLLM by itself."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    stream = llm.generate({"prompt_token_ids": list(PROMPT)}, wanted, secrets.token_hex(8))
    return list([output async for output in stream][-1].outputs[0].token_ids)
