"""An `sglang.Engine` of the user's own program: thaw's verbs on it, and `engine.generate` between them.

SGLang ends all processes below the one that made an `Engine`, and that one too when it fails. So each program here is a
process of its own: one that calls `generate`, an `async` one, and (in the soak) the whole law book.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

import thaw
from thaw.core.errors import InvalidRequest, NotFound
from thaw.engines.base import Engine
from thaw.engines.sglang.client.engine import SglangEngine
from thaw.engines.sglang.settings import BACKEND, ON_CPU, cpu_environment
from thaw.testing.laws.kit import LIMIT_S, Lab, every_knob, greedy, ids, same, seeded
from thaw.testing.plans import mount_at

pytest.importorskip("sglang")

PLAIN = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True}
PROMPT = ids(300)


def made(model: Path) -> Any:
    import sglang

    own = {**ON_CPU, "max_total_tokens": 8192}
    return sglang.Engine(model_path=str(model), context_length=2048, radix_cache_backend=BACKEND, **own)


def native(engine: Any) -> list[int]:
    """What SGLang generates by itself, in a call of the user's own."""
    return list(engine.generate(input_ids=list(PROMPT), sampling_params=PLAIN)["output_ids"])


# -- the programs


def plain_program(model: Path, folder: Path) -> None:
    with made(model) as sgl:
        lab = Lab(mount_at(folder / "packs"))
        with thaw.attach(sgl) as engine:  # before its first request
            assert isinstance(engine, SglangEngine)
            users_calls_between_verbs(engine, sgl, lab)
            every_verb(engine, lab)
            captured_while_it_decodes(engine, sgl, lab)
            aborted_it_goes_on(engine, sgl, lab)
            beside_a_call_of_the_users(engine, sgl, lab)
            sglangs_own_controls(engine, model, lab)
            wrong_requests_cost_themselves(engine, sgl, lab)
        assert native(sgl) == native(sgl)
        with thaw.attach(sgl) as engine:  # a second time
            users_calls_between_verbs(engine, sgl, lab)
        what_cannot_be_attached(sgl)
        a_second_engine_of_the_program(sgl, model, lab)


def users_calls_between_verbs(engine: Engine, sgl: Any, lab: Lab) -> None:
    before = native(sgl)
    for _ in range(2):
        session = lab.begin(engine)
        assert list(lab.one(engine, session, greedy(12)).token_ids) == before
        assert native(sgl) == before


def every_verb(engine: SglangEngine, lab: Lab) -> None:
    session = lab.begin(engine, 300, start=1)
    twin = lab.twin(engine, session)
    whole = lab.one(engine, session, seeded(16))
    same(whole, lab.one(engine, lab.move(engine, twin, engine), seeded(16)))
    engine.park(twin).result(LIMIT_S)
    assert engine.pin(twin, 30.0)
    one = lab.run(engine, *lab.fork(engine, twin, 3), sampling=every_knob())
    two = lab.run(engine, *lab.fork(engine, twin, 3), sampling=every_knob())
    for a, b in zip(one, two, strict=True):
        same(a, b)


def captured_while_it_decodes(engine: Engine, sgl: Any, lab: Lab) -> None:
    parent = lab.begin(engine, start=3)
    captured, whole = lab.captured_amid(engine, parent)
    native(sgl)
    rest = lab.resume(engine, lab.hydrate(engine, lab.plan(captured)).session)[0]
    same(rest, whole)


def aborted_it_goes_on(engine: Engine, sgl: Any, lab: Lab) -> None:
    session, _, whole = lab.stopped_amid(engine, lab.begin(engine, start=6))
    assert len(native(sgl)) == 12
    assert lab.resume(engine, session)[0].token_ids == whole.token_ids


def beside_a_call_of_the_users(engine: Engine, sgl: Any, lab: Lab) -> None:
    """A verb that begins while a call of the user's runs the loop goes on there, and after it on thaw's thread."""
    long = {**PLAIN, "max_new_tokens": 400}
    stream = sgl.generate(input_ids=list(PROMPT), sampling_params=long, stream=True)
    next(stream)
    lab.one(engine, lab.begin(engine, start=7), seeded(8))  # nobody runs the loop between two steps of a stream
    assert len(list(stream)[-1]["output_ids"]) == 400
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(sgl.generate, input_ids=list(PROMPT), sampling_params=long)
        while not sgl.loop.is_running():
            time.sleep(0.001)
        beside = lab.one(engine, lab.begin(engine, start=7), seeded(500))
        assert len(call.result(LIMIT_S)["output_ids"]) == 400
        assert len(beside.token_ids) == 500


def sglangs_own_controls(engine: SglangEngine, model: Path, lab: Lab) -> None:
    session = lab.begin(engine, start=8)
    engine.flush_cache()
    twin = lab.twin(engine, session)
    same(lab.one(engine, session, seeded(4)), lab.one(engine, twin, seeded(4)))
    engine.update_weights(model)
    with pytest.raises(NotFound, match=r"no config\.json"):
        engine.update_weights(model / "nothing")


def wrong_requests_cost_themselves(engine: Engine, sgl: Any, lab: Lab) -> None:
    with pytest.raises(thaw.ThawError):
        lab.one(engine, lab.begin(engine, 300), greedy(4), ids(5000))
    assert len(native(sgl)) == 12


def what_cannot_be_attached(sgl: Any) -> None:
    with pytest.raises(InvalidRequest, match="api_key"):
        thaw.attach(sgl, api_key="x")
    with pytest.raises(InvalidRequest, match="tokenizer"):
        thaw.attach(sgl, tokenizer=object())


def a_second_engine_of_the_program(sgl: Any, model: Path, lab: Lab) -> None:
    """The last thing here: SGLang's shutdown of one ends the other, whose watchdog would end this program for it."""
    with made(model) as second, thaw.attach(sgl) as one, thaw.attach(second) as two:
        session = lab.begin(one, 300, start=9)
        moved = lab.move(one, lab.twin(one, session), two)
        same(lab.one(one, session, seeded(8)), lab.one(two, moved, seeded(8)))
        sgl.tokenizer_manager._subprocess_watchdog.stop()


def async_program(model: Path, folder: Path) -> None:
    sgl = made(model)
    asyncio.run(served(sgl, folder))
    with pytest.raises(InvalidRequest, match="is closed"):
        thaw.attach(sgl)
    sgl.shutdown()


async def served(sgl: Any, folder: Path) -> None:
    async def own() -> list[int]:
        out = await sgl.async_generate(input_ids=list(PROMPT), sampling_params=PLAIN)
        return list(out["output_ids"])

    with pytest.raises(InvalidRequest, match="no request yet"):
        thaw.attach(sgl)
    before = await own()
    with pytest.raises(InvalidRequest, match="another thread"):
        thaw.attach(sgl)
    engine = await asyncio.to_thread(thaw.attach, sgl)
    repo = await thaw.aio.init(folder / "repo", engine=engine)
    session = await repo.session(seed=3)
    await session.append(token_ids=PROMPT)
    one, two = await asyncio.gather(session.generate(sampling=greedy(12)), own())
    assert list(one.token_ids) == two == before
    await session.commit("asked", branch="main")
    assert await own() == before
    await asyncio.to_thread(engine.close)
    assert await own() == before


# -- each in a process of its own


def run(program: Callable[[Path, Path], None], model: Path, folder: Path, told: Connection) -> None:
    os.environ.update(cpu_environment())
    try:
        program(model, folder)
    except BaseException:
        told.send(traceback.format_exc())
        raise
    told.send("")


@pytest.mark.slow("a program of its own boots SGLang")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("program", [plain_program, async_program])
def test_an_engine_of_the_users_own(
    program: Callable[[Path, Path], None], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    answer, told = context.Pipe(duplex=False)
    model = tiny_model("llama", dtype="bfloat16", head_dim=64)
    process = context.Process(target=run, args=(program, model, tmp_path, told))
    process.start()
    told.close()  # an end without an answer is an EOFError
    try:
        assert answer.poll(800) and answer.recv() == ""
    finally:
        process.join(60)
        process.kill()


@pytest.mark.soak(
    "the whole law book once more",
    receipt="sglang-law-book-in-process",
    covers=("src/thaw/engines/sglang", "src/thaw/engines/served", "src/thaw/data", "src/thaw/testing/laws"),
)
@pytest.mark.timeout(3600)
def test_the_law_book(soak_receipt: Callable[..., None]) -> None:
    book = Path(__file__).with_name("law_book.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(book)], env={**os.environ, **cpu_environment()}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    counts = {word: float(n) for n, word in re.findall(r"(\d+) (passed|skipped)", done.stdout)}
    assert counts["passed"] > 100
    soak_receipt(
        what="the whole law book (`thaw.testing.EngineTests`) on sglang.Engine objects of one program",
        held="every law",
        laws=counts,
    )
