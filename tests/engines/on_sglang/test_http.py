"""A stock SGLang server, started as its documentation says with one more flag, joined by its address."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import thaw
from light_client import HEAVY, light_client
from thaw.core.errors import InvalidRequest, NotFound, ThawError
from thaw.core.sampling import Sampling
from thaw.engines.served import protocol
from thaw.engines.sglang.client.engine import SglangEngine
from thaw.engines.sglang.settings import ON_CPU, SglangSettings, command_line, cpu_environment, environment
from thaw.engines.sglang.versions import reply_status
from thaw.testing.laws.kit import LIMIT_S, Lab, greedy, ids, same, seeded
from thaw.testing.messages import HOSTILE, MOST_SAID, ODD, odd_messages
from thaw.testing.plans import mount_at

pytest.importorskip("sglang")

KEY = "the key of this server"
BOOT_LIMIT_S = 580.0


class Server:
    """`python -m sglang.launch_server`, in a process group of its own."""

    def __init__(self, model: Path, log: Path, settings: SglangSettings, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        arguments = {"model_path": model, "port": port, "api_key": KEY, "context_length": 2048}
        self.log = log
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "sglang.launch_server", *command_line({**ON_CPU, **arguments}),
                "--skip-server-warmup", *flags,
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **cpu_environment(), **environment(settings)},
            start_new_session=True,
        )  # fmt: skip

    def wait(self) -> Server:
        ends = time.monotonic() + BOOT_LIMIT_S
        while time.monotonic() < ends:
            assert self._process.poll() is None, "the server ended while it started"
            try:
                if httpx.get(f"{self.url}/health", timeout=5.0).status_code < 600:
                    return self
            except httpx.HTTPError:
                time.sleep(0.2)
        raise AssertionError("the server did not start")

    def end(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def generate(self, **body: Any) -> httpx.Response:
        sampling = {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True}
        asked = {"sampling_params": sampling, **body}
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        return httpx.post(f"{self.url}/generate", content=json.dumps(asked), headers=headers, timeout=LIMIT_S)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", dtype="bfloat16", head_dim=64)


@pytest.fixture(scope="module")
def mail(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mail") / "engine"


@pytest.fixture(scope="module")
def server(model: Path, mail: Path) -> Iterator[Server]:
    settings = SglangSettings(mail=str(mail), guest_fraction=0.001, spill_nbytes=1 << 30)
    one = Server(model, mail.with_name("server.log"), settings, "--radix-cache-backend", "thaw")
    try:
        yield one.wait()
    finally:
        one.end()


@pytest.fixture
def engine(server: Server) -> Iterator[SglangEngine]:
    with thaw.attach(server.url, api_key=KEY) as joined:
        assert isinstance(joined, SglangEngine)
        yield joined


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


def hints(payload: dict[str, Any]) -> dict[str, Any]:
    action = {"action_id": "0", "action_type": "thaw", "action_version": "1", "payload": payload}
    return {"protocol_version": "1", "message_id": "m", "actions": [action]}


def test_every_verb_through_the_servers_own_route(engine: SglangEngine, lab: Lab) -> None:
    session = lab.begin(engine, 300)
    twin = lab.twin(engine, session)
    whole = lab.one(engine, session, seeded(16))
    part = lab.twin(engine, session, at=308)
    same(whole, lab.resume(engine, lab.move(engine, part, engine))[0])
    engine.park(twin).result(LIMIT_S)
    same(whole, lab.one(engine, twin, seeded(16)))
    assert whole.num_cached_tokens == 299


def test_the_next_client_takes_up_what_the_one_before_committed(server: Server, tmp_path: Path) -> None:
    with thaw.attach(server.url, api_key=KEY) as one, thaw.open(tmp_path / "repo", engine=one) as repo:
        session = repo.session(seed=3)
        session.append(token_ids=ids(400))
        session.commit("read it", branch="main")
        expected = session.generate(sampling=seeded(8))
    with thaw.attach(server.url, api_key=KEY) as two, thaw.open(tmp_path / "repo", engine=two) as repo:
        again = repo.session("main").generate(sampling=seeded(8))
        assert (again.token_ids, again.logprobs) == (expected.token_ids, expected.logprobs)
        assert again.num_cached_tokens == 399
        assert repo.engine_settings() is not None and KEY not in str(repo.engine_settings())


def test_a_client_loads_neither_torch_nor_transformers(server: Server, engine: SglangEngine, tmp_path: Path) -> None:
    """Nor does it where it commits and brings back, once the identity of the model's files was said on this machine."""
    engine.identity()
    found = light_client(server.url, KEY, tmp_path / "repo")
    assert HEAVY.isdisjoint(found["loaded"]) and found["restored"] > 0
    assert found["joined_s"] <= 1.0, found


def test_a_client_that_leaves_leaves_nothing_behind(server: Server, lab: Lab) -> None:
    with thaw.attach(server.url, api_key=KEY) as one:
        before = one.stats()["records"]
        for _ in range(3):
            lab.begin(one, 100)
    with thaw.attach(server.url, api_key=KEY) as two:
        assert two.stats()["records"] <= before


def test_plain_requests_are_sglangs_own(server: Server, engine: SglangEngine, lab: Lab) -> None:
    """Their prefix cache works as ever, and nothing of a session's is in it."""
    lab.begin(engine, 200)
    tokens = list(ids(200))
    first, second = (server.generate(input_ids=tokens).json()["meta_info"]["cached_tokens"] for _ in range(2))
    assert (first, second) == (0, 199)
    other = hints({"anything": 1})
    other["actions"][0]["action_type"] = "somebody-elses"
    assert server.generate(input_ids=tokens, kv_hints=other).json()["meta_info"]["cached_tokens"] == 199


@pytest.mark.parametrize(("name", "message"), [*HOSTILE.items(), ("nothing", None)], ids=[*HOSTILE, "nothing"])
def test_no_path_comes_from_a_request_and_what_is_wrong_costs_itself_alone(
    server: Server, engine: SglangEngine, lab: Lab, name: str, message: object
) -> None:
    """The reply says why, and so does the log. Half a character SGLang itself does not take."""
    reply = server.generate(input_ids=list(ids(20)), kv_hints=hints({"message": message}))
    said = reply.json()
    if name.startswith("half a character"):
        assert reply.status_code == 400
        return
    why = json.loads(said.get("error", said)["message"])
    assert reply.status_code in (400, 404) and why["kind"] in ("invalid-request", "not-found")
    assert why["error"] in server.log.read_text(errors="replace") and len(why["error"]) <= MOST_SAID
    assert len(lab.one(engine, lab.begin(engine, 20), greedy(2)).token_ids) == 2


def test_messages_with_odd_fields_are_answered_in_words_and_the_engine_lives(
    server: Server, engine: SglangEngine, lab: Lab
) -> None:
    session, asked = lab.begin(engine, 20), list(odd_messages())
    tokens = list(ids(20))
    with ThreadPoolExecutor(8) as threads:
        replies = list(
            threads.map(lambda message: server.generate(input_ids=tokens, kv_hints=hints({"message": message})), asked)
        )
    for message, reply in zip(asked, replies, strict=True):
        said = reply.json()
        assert reply.status_code in (200, 400, 404, reply_status(429)), (message, said)
        assert reply.status_code == 200 or len(said.get("error", said)["message"]) <= MOST_SAID
    assert {reply.status_code for reply in replies} >= {200, 400}
    same(lab.one(engine, session, greedy(2)), lab.one(engine, lab.begin(engine, 20), greedy(2)))
    assert engine.stats()["running"] == 0


def test_sampling_with_odd_fields_is_answered_in_words_and_the_engine_lives(
    server: Server, engine: SglangEngine, lab: Lab
) -> None:
    session, message = lab.begin(engine, 20), {"op": "run", "id": "5" * 32, "record": "6" * 32}
    good = {"sampling": {"temperature": 0.5}, "seed": "3", "output_start": 20}
    odd = [{**good, name: value} for name in good for value in ODD]
    odd += [{**good, "sampling": {name: value}} for name in Sampling.__struct_fields__ for value in ODD]
    odd += [{**good, name: value} for name in ("eos_token_ids", "bad_ids") for value in ([1 << 62], [[1 << 62]], [[]])]
    for sampling in (*odd, *ODD):
        reply = server.generate(input_ids=list(ids(20)), kv_hints=hints({"message": message, "sampling": sampling}))
        assert reply.status_code in (200, 400), (sampling, reply.text)
    same(lab.one(engine, session, greedy(2)), lab.one(engine, lab.begin(engine, 20), greedy(2)))
    assert engine.stats()["running"] == 0


def test_what_a_session_cannot_go_on_with_is_refused_for_itself(server: Server) -> None:
    message = {"op": "run", "id": "5" * 32, "record": "6" * 32, "v": protocol.VERSION}
    sampling = {"temperature": 0.0, "max_new_tokens": 2, "regex": "a+"}
    for body in ({"sampling_params": sampling}, {"return_logprob": True, "logprob_start_len": 0}):
        reply = server.generate(input_ids=list(ids(20)), kv_hints=hints({"message": message}), **body)
        text = reply.text
        assert "unsupported" in text or reply.status_code == 400, text


def test_who_has_the_api_key_alone_keeps_no_more_than_the_guests_part(
    server: Server, engine: SglangEngine, lab: Lab
) -> None:
    def ask(i: int, **more: object) -> httpx.Response:
        message = {"op": "run", "id": f"{i + 7000:032x}", "record": f"{i:032x}", **more}
        return server.generate(input_ids=list(ids(1900, i)), kv_hints=hints({"message": message}))

    session, before = lab.begin(engine, 300), engine.stats()["arena_nbytes"]
    outcomes = [ask(i) for i in range(20)]
    assert (outcomes[0].status_code, outcomes[-1].status_code) == (200, reply_status(429))
    for what in ("arena: ", "spill: ", "do not share the engine's mail folder", "guest_fraction 0.001"):
        assert what in outcomes[-1].text
    limit = int((4 << 30) * 0.001) + int((1 << 30) * 0.001)
    assert limit // 2 < engine.stats()["arena_nbytes"] - before <= limit
    same(lab.one(engine, session, greedy(2)), lab.one(engine, lab.begin(engine, 300), greedy(2)))
    assert lab.capture(engine, session).num_kv > 300
    assert ask(50, drop=[f"{i:032x}" for i in range(20)]).status_code == 200


def test_the_owner_aborts_everything_and_sessions_stay(server: Server, engine: SglangEngine, lab: Lab) -> None:
    def abort_all() -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        httpx.post(f"{server.url}/abort_request", json={"abort_all": True}, headers=headers, timeout=LIMIT_S)

    session, part, whole = lab.stopped_amid(engine, lab.begin(engine, 300), after=1, stop=abort_all)
    assert part.token_ids == whole.token_ids[: len(part.token_ids)]
    assert lab.resume(engine, session)[0].token_ids == whole.token_ids


@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
def test_a_drain_of_a_paused_server_has_every_session_and_loses_nothing(
    server: Server, engine: SglangEngine, tmp_path: Path, mode: str
) -> None:
    """Its front end holds back every request, so commands go by mail. They alone do: the control is a prompt, which
    waits until the owner lets the server continue."""
    long = Sampling(temperature=0.8, max_tokens=700, ignore_eos=True)
    with thaw.open(tmp_path / "runs", engine=engine) as repo:
        whole, idle, running, waiting = (repo.session(seed=3) for _ in range(4))
        for session in (whole, idle, running):
            session.append("The river is long.")
        expected = whole.generate("", long).token_ids
        stream = running.stream("", long)
        next(iter(stream))
        owner(engine, "/pause_generation", {"mode": mode})
        try:
            held = engine.append(waiting.ref, [1, 2, 3])
            begun, captures = engine.view(running.ref).num_kv, engine.stats()["captures"]
            report = repo.drain(timeout_s=12.0)
            assert report.missed == () and engine.stats()["captures"] - captures == 3
            points = {one.session: one for one in report.points}
            assert points.keys() == {whole.ref, idle.ref, running.ref} and not held.done()
            assert begun <= points[running.ref].num_tokens == len(running.tokens) < 18 + 700
        finally:
            owner(engine, "/continue_generation", {})
        held.result(LIMIT_S)
        with contextlib.suppress(thaw.ThawError):
            stream.result(LIMIT_S)
        repo.undrain()
        assert engine.stats()["captures"] - captures == 3  # what was held back is not done once more
        assert idle.generate("", long).token_ids == expected
        assert repo.session(points[idle.ref].point).generate("", long).token_ids == expected
        assert repo.session(points[running.ref].point).resume().token_ids == expected
        assert running.resume().token_ids == expected


def owner(engine: SglangEngine, route: str, body: dict[str, object]) -> None:
    engine._loop.wait(engine._transport.post(route, body))


def test_without_the_key_it_is_refused(server: Server) -> None:
    with pytest.raises(InvalidRequest, match="API key"):
        thaw.attach(server.url, api_key="another").close()


def test_a_server_that_was_not_told_to_use_thaw_says_so(model: Path, tmp_path: Path) -> None:
    stock = Server(model, tmp_path / "stock.log", SglangSettings())
    try:
        stock.wait()
        with pytest.raises(NotFound, match="radix-cache-backend thaw"):
            thaw.attach(stock.url, api_key=KEY).close()
        assert stock.generate(input_ids=list(ids(20))).status_code == 200
    finally:
        stock.end()


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(ThawError, match="no server"):
        thaw.load_engine("sglang", url="http://127.0.0.1:9")
