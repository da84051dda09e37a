"""What an engine's owner does works as before, with sessions parked and pinned: reset, pause, sleep, weights, shutdown.

Owners' calls are vLLM's own methods of `AsyncLLM` and its server's routes. Parked sessions go on bit for bit after
each, or are refused by name where the weights changed. Pins are the exception (docs/engines/vllm.md).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from packaging.version import Version
from test_http import Server

import thaw
from thaw.core.errors import Busy, InvalidRequest, StaleSession
from thaw.data.locations import StoreMount
from thaw.engines import load_engine
from thaw.engines.base import Completion
from thaw.serve.record import born
from thaw.testing.laws.bytes_law import blob_ids
from thaw.testing.laws.kit import LIMIT_S, Lab, bits, every_knob, greedy, ids, same, seeded, wait_for
from thaw.testing.plans import mount_at

pytest.importorskip("vllm")

from thaw.engines.served.client.channel import worker_facts
from thaw.engines.served.mailbox import Mailbox
from thaw.engines.vllm.client.engine import VllmEngine
from thaw.engines.vllm.settings import VllmSettings

TTL_S = 10.0


class Plain(NamedTuple):
    """What an ordinary request brought, of which thaw knows nothing."""

    token_ids: tuple[int, ...]
    logprobs: tuple[str, ...]
    num_cached_tokens: int


class Owner:
    """The engine's owner: vLLM's own calls, and ordinary requests."""

    def __init__(self, engine: VllmEngine) -> None:
        self._loop, self._llm = engine._loop.inner, engine._transport._llm  # type: ignore[attr-defined]
        self._count = 0

    def __call__(self, method: str, *args: object, **kwargs: object) -> Any:
        return self._wait(getattr(self._llm, method)(*args, **kwargs))

    def _wait(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(LIMIT_S)

    def pause(self, mode: str = "abort", *, clear_cache: bool = True) -> None:
        self("pause_generation", mode=mode, clear_cache=clear_cache)

    def resume(self) -> None:
        self("resume_generation")

    def rest(self) -> None:
        """Wait until the engine has nothing to do; a request that was answered is not yet cleared away."""
        ends = time.monotonic() + LIMIT_S
        while self._wait(self._llm.engine_core.call_utility_async("has_work")):
            assert time.monotonic() < ends, "the engine does not come to rest"
            time.sleep(0.01)

    def load(self, weights: Path) -> None:
        """As trainers do, in place."""
        self("collective_rpc", "reload_weights", kwargs={"weights_path": str(weights)})

    def transfer(self, weights: Path) -> None:
        """As vLLM's weight transfer does, step by step."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self("start_weight_update")
        self("update_weights", WeightTransferUpdateRequest(update_info={"folder": str(weights)}))
        self("finish_weight_update")

    def plain(self, tokens: tuple[int, ...], count: int = 8) -> Plain:
        last = self._asked(tokens, count, 0)
        one = last.outputs[0]
        own = tuple(step[token].logprob.hex() for step, token in zip(one.logprobs, one.token_ids, strict=True))
        return Plain(tuple(one.token_ids), own, last.num_cached_tokens)

    def told(self, tokens: tuple[int, ...], count: int, likeliest: int) -> tuple[list[int], list[dict[int, float]]]:
        """An ordinary request's tokens, and the log probabilities of the likeliest at each."""
        one = self._asked(tokens, count, likeliest).outputs[0]
        return list(one.token_ids), [{token: x.logprob for token, x in step.items()} for step in one.logprobs]

    def _asked(self, tokens: tuple[int, ...], count: int, likeliest: int) -> Any:
        from vllm import SamplingParams

        self._count += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, logprobs=likeliest)

        async def run() -> Any:
            stream = self._llm.generate({"prompt_token_ids": list(tokens)}, sampling, f"plain-{self._count}")
            return [output async for output in stream][-1]

        return self._wait(run())


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", dtype="bfloat16", head_dim=64)


@pytest.fixture(scope="module")
def other_weights(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", dtype="bfloat16", head_dim=64, seed=1)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[VllmEngine]:
    """With code of the owner's in its worker: `in_place`, and the weight transfer of `from_files`."""
    from vllm.config import WeightTransferConfig

    options = {
        "enforce_eager": True, "max_model_len": 4096, "worker_extension_cls": "in_place.InPlace",
        "weight_transfer_config": WeightTransferConfig(backend="files"),
    }  # fmt: skip
    with load_engine("vllm", model=str(model), **options) as loaded:
        assert isinstance(loaded, VllmEngine)
        yield loaded


@pytest.fixture(scope="module")
def owner(engine: VllmEngine) -> Owner:
    return Owner(engine)


@pytest.fixture(autouse=True)
def as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """One failing test leaves the next ones an engine that runs."""
    yield
    if "owner" in request.fixturenames:
        request.getfixturevalue("engine").release_pins()
        request.getfixturevalue("owner").resume()


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> StoreMount:
    return mount_at(tmp_path_factory.mktemp("packs"))


@pytest.fixture(scope="module")
def lab(mount: StoreMount) -> Lab:
    return Lab(mount)


def reset(owner: Owner) -> None:
    assert owner("reset_prefix_cache") is True


def reset_with_connector(owner: Owner) -> None:
    assert owner("reset_prefix_cache", reset_connector=True) is True


def pause(mode: str, clear_cache: bool) -> Callable[[Owner], None]:
    def act(owner: Owner) -> None:
        owner.pause(mode, clear_cache=clear_cache)
        assert owner("is_paused") is True
        owner.resume()

    return act


def sleep(level: int) -> Callable[[Owner], None]:
    """On a CPU vLLM pauses and clears its caches; its workers say that they do not support sleep, and keep all."""

    def act(owner: Owner) -> None:
        owner("sleep", level)
        assert owner("is_sleeping") is True
        owner("wake_up")
        assert owner("is_sleeping") is False

    return act


ACTS: dict[str, Callable[[Owner], None]] = {
    "reset": reset,
    "reset with connector": reset_with_connector,
    "pause": pause("abort", True),
    "pause, cache kept": pause("abort", False),
    "pause, wait": pause("wait", True),
    "pause, keep": pause("keep", True),
    "pause, keep, cache kept": pause("keep", False),
    "sleep 0": sleep(0),
    "sleep 1": sleep(1),
    "sleep 2": sleep(2),
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS.keys())
def test_parked_sessions_go_on_bit_for_bit(
    engine: VllmEngine, owner: Owner, lab: Lab, act: Callable[[Owner], None]
) -> None:
    session = lab.begin(engine, 500, start=1)
    lab.one(engine, session, seeded(9))
    engine.park(session).result(LIMIT_S)
    expected = lab.one(engine, lab.twin(engine, session), every_knob(), (1, 2))
    act(owner)
    same(expected, lab.one(engine, session, every_knob(), (1, 2)))
    assert engine.stats()["running"] == 0


def test_a_reset_right_after_a_request_works(engine: VllmEngine, owner: Owner, lab: Lab) -> None:
    """The copy out of the request's blocks is not in the way, or vLLM says so and a second try works."""
    answers = []
    for start in range(10):
        lab.begin(engine, 300, start=start)
        answers.append(owner("reset_prefix_cache"))
    print("resets right after a request:", answers)
    assert owner("reset_prefix_cache") is True


RUNNING_ACTS: dict[str, Callable[[Owner], object]] = {
    "reset, running ones too": lambda owner: owner("reset_prefix_cache", reset_running_requests=True),
    "pause, wait": pause("wait", True),
    "pause, keep": pause("keep", True),
    "pause, keep, cache kept": pause("keep", False),
}


@pytest.mark.parametrize("act", RUNNING_ACTS.values(), ids=RUNNING_ACTS.keys())
def test_running_sessions_go_on_bit_for_bit(
    engine: VllmEngine, owner: Owner, lab: Lab, act: Callable[[Owner], object]
) -> None:
    """vLLM takes their blocks away; they come back from the arena and not by computing them again."""
    session = lab.begin(engine, 500, start=2)
    twin = lab.twin(engine, session)
    expected = lab.one(engine, lab.twin(engine, session), seeded(250))
    running = lab.start(engine, twin, sampling=seeded(250))
    wait_for(running, 10)
    act(owner)
    same(expected, running.result(LIMIT_S)[0])


@pytest.mark.parametrize("act", ["pause", "sleep 1"])
def test_what_an_owner_stops_is_an_aborted_turn_that_resumes(
    engine: VllmEngine, owner: Owner, lab: Lab, act: str
) -> None:
    session = lab.begin(engine, 300, start=3)
    twin, _, expected = lab.stopped_amid(engine, session, after=10, stop=lambda: ACTS[act](owner))
    rest = lab.resume(engine, twin)[0]
    assert rest.token_ids == expected.token_ids and bits(rest.logprobs) == bits(expected.logprobs)


def test_captures_go_on_while_the_engine_is_paused_and_what_computes_waits_and_is_told_when_it_is_dropped(
    engine: VllmEngine, owner: Owner, lab: Lab
) -> None:
    session = lab.begin(engine, 300, start=4)
    owner.pause(clear_cache=False)
    captured = lab.capture(engine, session)
    assert captured.num_kv == 299 and owner("is_paused") is True
    plan = lab.plan(captured)
    waits = engine.hydrate(plan)
    _until_it_waits(engine)
    assert not waits.done()
    owner.resume()
    assert waits.result(LIMIT_S).proof.hit
    owner.pause(clear_cache=False)
    dropped = engine.hydrate(plan)
    _until_it_waits(engine)
    owner.pause(clear_cache=False)
    with pytest.raises(Busy, match="owner"):
        dropped.result(LIMIT_S)
    owner.resume()
    assert lab.capture(engine, session).segments == captured.segments


def _until_it_waits(engine: VllmEngine) -> None:
    """Until the engine has a request that computes."""
    ends = time.monotonic() + LIMIT_S
    while not engine.stats()["running"]:
        assert time.monotonic() < ends
        time.sleep(0.01)


# -- ordinary requests for the same prompt


def test_a_session_is_hydrated_into_an_engine_where_an_ordinary_request_has_read_its_prompt(
    engine: VllmEngine, owner: Owner, lab: Lab
) -> None:
    """The session continues from its own KV, also where it is told to share its prefix: all of it is loaded, nothing is
    hit. The control, a new session that shares its prefix, does take the ordinary request's blocks."""
    tokens = ids(700, 9)
    session = engine.open(seed=20)
    for start, stop in itertools.pairwise((0, 90, *range(300, 317), 560, 700)):
        engine.append(session, tokens[start:stop]).result(LIMIT_S)
    plan = lab.plan(lab.capture(engine, session))
    expected = lab.one(engine, session, seeded(16), (3, 1))
    whole = lab.capture(engine, session)
    reset(owner)
    assert [owner.plain(tokens).num_cached_tokens for _ in range(2)] == [0, 640]

    for one in (plan, msgspec.structs.replace(plan, share_prefix=True, salt="")):
        before = engine.stats()
        hydrated = lab.hydrate(engine, one)
        after = engine.stats()
        assert hydrated.proof.num_cached_tokens == after["loaded_tokens"] - before["loaded_tokens"] == plan.num_kv
        assert after["hit_tokens"] == before["hit_tokens"]
        same(expected, lab.one(engine, hydrated.session, seeded(16), (3, 1)))
        assert blob_ids(lab.capture(engine, hydrated.session)) == blob_ids(whole)

    before = engine.stats()["hit_tokens"]
    shared = engine.open(seed=20, share_prefix=True)
    engine.append(shared, tokens).result(LIMIT_S)
    assert engine.stats()["hit_tokens"] - before == 640, "the blocks are there to be hit"


# -- pins


def test_a_bare_reset_refuses_while_blocks_are_pinned(engine: VllmEngine, owner: Owner, lab: Lab) -> None:
    session = lab.begin(engine, 400, start=5)
    assert engine.pin(session, 60).result(LIMIT_S) == 384
    assert owner("reset_prefix_cache") is False
    assert engine.stats()["pinned_blocks"] == 3
    engine.release_pins()
    assert engine.stats()["pinned_blocks"] == 0
    assert owner("reset_prefix_cache") is True


def test_a_reset_with_the_connector_ends_the_pins_and_works_the_second_time(
    engine: VllmEngine, owner: Owner, lab: Lab
) -> None:
    """vLLM resets its own cache first and asks the connector then."""
    session = lab.begin(engine, 400, start=6)
    engine.pin(session, 60).result(LIMIT_S)
    assert owner("reset_prefix_cache", reset_connector=True) is False
    assert engine.stats()["pinned_blocks"] == 0
    assert owner("reset_prefix_cache", reset_connector=True) is True
    expected = lab.one(engine, lab.twin(engine, session), greedy(4))
    same(expected, lab.one(engine, session, greedy(4)))


KEEPING = ("pause, cache kept", "pause, keep, cache kept", "sleep 0")


@pytest.mark.parametrize("act", KEEPING)
def test_what_clears_nothing_works_and_leaves_pins(engine: VllmEngine, owner: Owner, lab: Lab, act: str) -> None:
    session = lab.begin(engine, 400, start=9)
    expected = lab.one(engine, lab.twin(engine, session), greedy(4))
    engine.pin(session, 60).result(LIMIT_S)
    ACTS[act](owner)
    assert engine.stats()["pinned_blocks"] == 3
    same(expected, lab.one(engine, session, greedy(4)))


CLEARING: dict[str, Callable[[Owner], object]] = {
    "pause": lambda owner: owner.pause(),
    "pause, wait": lambda owner: owner.pause("wait"),
    "pause, keep": lambda owner: owner.pause("keep"),
    "sleep 1": lambda owner: owner("sleep", 1),
    "sleep 2": lambda owner: owner("sleep", 2),
}


@pytest.mark.parametrize("act", CLEARING)
def test_what_clears_raises_while_blocks_are_pinned_and_the_engine_goes_on(
    engine: VllmEngine, owner: Owner, lab: Lab, act: str
) -> None:
    if Version(engine.info.version) < Version("0.27"):
        pytest.skip("0.26 ends there: docs/engines/vllm.md says so")
    session = lab.begin(engine, 400, start=7)
    expected = lab.one(engine, lab.twin(engine, session), greedy(4))
    engine.pin(session, 60).result(LIMIT_S)
    if Version(engine.info.version) < Version("0.32"):
        owner.rest()  # during work it ends there, too
    with pytest.raises(Exception, match="Failed to reset KV cache"):
        CLEARING[act](owner)
    engine.release_pins()  # the engine is paused now, and this is answered
    owner.resume()
    ACTS[act](owner)
    same(expected, lab.one(engine, session, greedy(4)))


@pytest.mark.parametrize("way", ["policy", "switch", "close", "time", "seconds 0", "another client's close"])
def test_thaws_own_verbs_end_pins_first(engine: VllmEngine, owner: Owner, lab: Lab, way: str) -> None:
    session = lab.begin(engine, 400, start=8)
    if way == "another client's close":
        with thaw.attach(engine._transport._llm) as another:  # type: ignore[attr-defined]
            theirs = lab.begin(another, 400, start=8)
            assert another.pin(theirs, 60).result(LIMIT_S) == 384  # type: ignore[attr-defined]
            before = engine.stats()["records"]
        assert engine.stats()["records"] == before - 1
    else:
        assert engine.pin(session, 0.5 if way == "time" else 60).result(LIMIT_S) == 384
    assert way == "another client's close" or owner("reset_prefix_cache") is False
    if way == "policy":
        engine.set_policy("7")
        engine.set_policy("0")
    elif way == "switch":
        engine.switch(on=False)
        with pytest.raises(InvalidRequest, match="switched off"):
            lab.one(engine, session, greedy(1))
        engine.switch(on=True)
    elif way == "close":
        engine.close_session(session)
    elif way == "time":
        time.sleep(1.0)  # nobody asks the engine anything meanwhile
    elif way == "seconds 0":
        engine.pin(session, 0).result(LIMIT_S)
    assert owner("reset_prefix_cache") is True


# -- weights: these come last, for sessions of the weights before are refused from here on


def test_ordinary_requests_get_no_kv_of_the_old_weights(
    engine: VllmEngine, owner: Owner, lab: Lab, model: Path, other_weights: Path
) -> None:
    """Without pins as in any vLLM. Negative control: a pin left, the owner takes no notice of the False that reset
    returned, and an ordinary request is answered from KV of weights that are gone. `release_pins` prevents it."""
    prompt = ids(400, 30)
    reset(owner)
    old = owner.plain(prompt)
    owner.load(other_weights)
    reset(owner)
    new = owner.plain(prompt)
    assert old.num_cached_tokens == new.num_cached_tokens == 0 and new.logprobs != old.logprobs

    owner.load(model)
    reset(owner)
    assert owner.plain(prompt) == old
    parked, pinned = lab.begin(engine, 400, start=31), lab.begin(engine, 400, start=32)
    assert engine.pin(pinned, 60).result(LIMIT_S) == 384
    owner.load(other_weights)
    assert owner("reset_prefix_cache") is False
    wrong = owner.plain(prompt)
    assert wrong.num_cached_tokens == 384 and wrong.logprobs != new.logprobs, "the control must fail"

    engine.release_pins()
    reset(owner)
    assert owner.plain(prompt) == new
    for session in (parked, pinned):
        with pytest.raises(StaleSession, match="weights changed"):
            lab.one(engine, session, greedy(1))


@pytest.mark.parametrize("clear_cache", [True, False])
def test_weights_changed_under_a_running_session(
    engine: VllmEngine, owner: Owner, lab: Lab, model: Path, other_weights: Path, clear_cache: bool
) -> None:
    """Where its blocks were cleared it would have to continue from KV of the old weights: refused. Where they were kept
    vLLM continues with them, as it does for everybody; what comes of it is used for nothing else."""
    owner.load(model)
    reset(owner)
    session = lab.begin(engine, 300, start=33)
    running = lab.start(engine, session, sampling=seeded(1000))
    wait_for(running, 5)
    owner.pause("keep", clear_cache=clear_cache)
    owner.load(other_weights)
    owner.resume()
    if clear_cache:
        with pytest.raises(StaleSession, match="weights changed"):
            running.result(LIMIT_S)
    else:
        assert len(running.result(LIMIT_S)[0].token_ids) == 1000
    with pytest.raises(StaleSession, match="weights changed"):
        lab.one(engine, session, greedy(1))
    assert len(lab.one(engine, lab.begin(engine, 300, start=33), greedy(2)).token_ids) == 2


def test_weights_that_are_the_same_again(engine: VllmEngine, owner: Owner, lab: Lab, model: Path) -> None:
    """Nothing changed, so nothing is refused."""
    owner.load(model)
    session = lab.begin(engine, 300, start=34)
    expected = lab.one(engine, lab.twin(engine, session), seeded(8))
    owner.pause()
    owner.load(model)
    owner.resume()
    same(expected, lab.one(engine, session, seeded(8)))


@pytest.mark.parametrize("way", ["load_weights", "one tensor", "weight transfer"])
def test_weights_changed_in_place_are_noticed_by_themselves(
    engine: VllmEngine, owner: Owner, lab: Lab, model: Path, other_weights: Path, way: str
) -> None:
    """Nobody announces it. The control: the new weights answer otherwise, and the old ones loaded back as before."""
    session = lab.begin(engine, 300, start=35)
    expected = lab.one(engine, lab.twin(engine, session), greedy(8))
    load_back = owner.load
    if way == "load_weights":
        owner("collective_rpc", "load_in_place", args=(str(other_weights),))
    elif way == "one tensor":
        owner("collective_rpc", "scale_in_place", args=("model.layers.1.input_layernorm.weight", 1.5))
    else:
        load_back = owner.transfer
        owner.transfer(other_weights)
    with pytest.raises(StaleSession, match="weights changed"):
        lab.one(engine, session, greedy(1))
    changed = lab.one(engine, lab.begin(engine, 300, start=35), greedy(8))
    assert bits(changed.logprobs) != bits(expected.logprobs), "the control must differ"
    load_back(model)
    same(expected, lab.one(engine, lab.begin(engine, 300, start=35), greedy(8)))


def test_shutdown_with_sessions_parked_pinned_and_running(engine: VllmEngine, lab: Lab) -> None:
    """The last test with this engine. It leaves no process and no mail."""
    parked, pinned, running = (lab.begin(engine, 400, start=40 + i) for i in range(3))
    engine.park(parked).result(LIMIT_S)
    engine.pin(pinned, 60).result(LIMIT_S)
    handle = lab.start(engine, running, sampling=greedy(3000))
    wait_for(handle, 3)
    transport = engine._transport
    mail, pids = transport.mail, [transport.facts.pid, *(facts.pid for facts in worker_facts(transport))]
    engine.close()
    ends = time.monotonic() + 10.0  # vLLM kills a process that does not end in time, and does not wait for that
    while any(map(born, pids)) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not [pid for pid in pids if born(pid)]
    assert not mail.folder.exists()


# -- the server


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Started when the engine above is gone. Sessions that nobody uses are released soon."""
    server = Server(
        model, tmp_path_factory.mktemp("server"), "--max-model-len", "4096",
        settings=VllmSettings(session_ttl_s=TTL_S), VLLM_SERVER_DEV_MODE="1",
    )  # fmt: skip
    yield server
    server.stop()


def post(server: Server, path: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(f"{server.url}{path}", b""), timeout=60) as reply:
        return json.loads(reply.read() or b"null")


def test_the_servers_routes_with_sessions_parked_and_pinned(server: Server, lab: Lab) -> None:
    with thaw.attach(server.url) as engine:
        assert isinstance(engine, VllmEngine)
        session = lab.begin(engine, 400)

        def again() -> Completion:
            return lab.one(engine, lab.twin(engine, session), seeded(12))

        expected = again()
        assert post(server, "/reset_prefix_cache") == {"success": True}
        same(expected, again())
        assert post(server, "/reset_prefix_cache?reset_external=true") == {"success": True}
        same(expected, again())
        assert engine.pin(session, 60).result(LIMIT_S) == 384
        assert post(server, "/reset_prefix_cache") == {"success": False}
        assert post(server, "/reset_prefix_cache?reset_external=true") == {"success": False}
        assert post(server, "/reset_prefix_cache?reset_external=true") == {"success": True}
        same(expected, again())
        for route, status in (("/sleep?level=1", "sleeping"), ("/wake_up", "awake")):
            said = post(server, route)
            assert said is None or said["status"] == status, "0.26 says nothing"
        same(expected, again())


CLIENT = """
import sys, time, thaw
from thaw.core.sampling import Sampling
from thaw.engines.base import GenerateRequest
engine = thaw.attach(sys.argv[1])
kept = []
for i in range(6):
    session = engine.open(seed=i)
    engine.append(session, list(range(i, 250))).result(60)
    kept.append(session)
engine.pin(kept[0], 1.0).result(60)
sampling = Sampling(temperature=0.0, max_tokens=3000, ignore_eos=True)
handle = engine.generate([GenerateRequest(session=s, prompt=(1,), sampling=sampling) for s in kept[:2]])
print("pid", engine.stats()["records"], next(iter(handle)).token_ids, flush=True)
time.sleep(600)
"""


def test_a_client_that_is_killed_leaves_nothing_behind_for_long(server: Server, lab: Lab) -> None:
    """Its requests end with its connections, its pin with its time, its records when nobody used them for so long."""
    with thaw.attach(server.url) as engine:
        assert isinstance(engine, VllmEngine)
        before = engine.stats()
        with subprocess.Popen(
            [sys.executable, "-c", CLIENT, server.url], stdout=subprocess.PIPE, env=dict(os.environ)
        ) as client:
            assert client.stdout is not None
            assert client.stdout.readline().startswith(b"pid")
            held = engine.stats()
            assert held["records"] >= before["records"] + 6 and held["running"] == 2
            client.send_signal(signal.SIGKILL)
        session = lab.begin(engine, 100)
        ends = time.monotonic() + 60.0
        while (left := engine.stats())["records"] > 1 or left["running"]:
            assert time.monotonic() < ends, left
            assert len(lab.one(engine, session, greedy(1)).token_ids) == 1, "a session in use stays"
            time.sleep(TTL_S / 4)
        assert left["pinned_blocks"] == 0
        assert post(server, "/reset_prefix_cache") == {"success": True}
        assert left["arena_nbytes"] < held["arena_nbytes"]
    mail = server.log.parent / "mail"
    left_over = [*(mail / "answers").iterdir(), *(mail / "plans").iterdir()]
    assert len(left_over) <= 2, "the last words to its two requests, which the engine sweeps in an hour"
    for path in left_over:
        os.utime(path, (0, 0))
    Mailbox(mail).sweep()
    assert not any(path.exists() for path in left_over)
